"""What any long command needs: files, options, processes, checkpoints, resuming."""
