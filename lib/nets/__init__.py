"""Networks beside the DFGN, their layers and files; the methods that tune a base."""
