"""The text encoder that is trained with the DFGN, on a frozen MiniLM's features or on tokens."""
import torch
import torch.nn as nn

from lib.layers import GEGLU, Attention
from lib.towers import MiniLM, clip_tokenizer

END = 49407                                      # open_clip's token after a caption
UNKNOWN = 258                                    # its token of the word "#"


class TextEncoder(nn.Module):
    """Small transformer, trained with the DFGN, on a frozen MiniLM's features or (kind small) on open_clip's tokens.

    vocabulary: the sorted tokens that have an embedding (data.vocabulary). Any other reads as "#", which word dropout
    trains to stand for a word that is not told."""

    def __init__(self, c):
        super().__init__()
        if c.kind == "small":
            self.register_buffer("vocabulary", torch.arange(c.vocab))
            self.token = nn.Embedding(c.vocab, c.width)
            self.position = nn.Parameter(torch.randn(c.length, c.width) * 0.02)
            nn.init.normal_(self.token.weight, std=0.3)  # captions are told apart by their words from the first step
        self.project = nn.Linear(MiniLM.width, c.width) if c.kind == "minilm" else None
        self.norms = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(2 * c.layers))
        self.attns = nn.ModuleList(Attention(c.width, max(c.width // 32, 1), 32) for _ in range(c.layers))
        self.ffs = nn.ModuleList(GEGLU(c.width, 2) for _ in range(c.layers))
        self.norm_out = nn.LayerNorm(c.width)

    def rows(self, tokens):
        """tokens -> rows of the embedding."""
        rows, unknown = torch.searchsorted(self.vocabulary, torch.stack([tokens, torch.full_like(tokens, UNKNOWN)]))
        rows = rows.clamp(max=len(self.vocabulary) - 1)
        return torch.where(self.vocabulary[rows] == tokens, rows, unknown)

    def knows(self, tokens):
        """Which tokens have an embedding, bool of the same shape."""
        return torch.isin(tokens, self.vocabulary)

    def unknown(self, prompt):
        """(words of a prompt that were not trained on, whether any piece of one was)."""
        def known(text):
            return self.knows(torch.tensor(clip_tokenizer().encode(text), device=self.vocabulary.device).long())
        words = [word for word in prompt.split() if not known(word).all()]
        return words, not prompt or bool(known(prompt).any())

    def forward(self, text):
        """text: tokens (B, L) int64 or a MiniLM's features (B, L, 384) -> features (B, L', width) and mask (B, L'), cut
        to the longest caption.

        Behind a caption a MiniLM's features are zero. Tokens end with their first END; 0 is padding behind it, and "!"
        before it."""
        lengths = (text != 0).any(-1).sum(1) if self.project else (text == END).int().argmax(1) + 1
        text = text[:, :int(lengths.max())]
        mask = torch.arange(text.shape[1], device=text.device) < lengths[:, None]
        x = self.project(text) if self.project else self.token(self.rows(text)) + self.position[:text.shape[1]]
        for i, (attn, ff) in enumerate(zip(self.attns, self.ffs)):
            x = x + attn(self.norms[2 * i](x), mask=mask)
            x = x + ff(self.norms[2 * i + 1](x))
        return self.norm_out(x), mask
