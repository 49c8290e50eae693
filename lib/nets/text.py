"""Text encoders that are trained with the DFGN: on a frozen MiniLM's sentences, or on tokens."""
import numpy as np
import torch
import torch.nn as nn

from lib.media.pictures import even_frames
from lib.nets.layers import GEGLU, Attention
from lib.nets.towers import MiniLM, clip_tokenizer

SAME = 64.0                                      # squared distance below which two sentences are of one concept
END = 49407                                      # open_clip's token after a caption
UNKNOWN = 258                                    # its token of the word "#"


class Blocks(nn.Module):
    """Transformer of a text encoder."""

    def __init__(self, c):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(c.width) for _ in range(2 * c.layers))
        self.attns = nn.ModuleList(Attention(c.width, max(c.width // 32, 1), 32) for _ in range(c.layers))
        self.ffs = nn.ModuleList(GEGLU(c.width, 2) for _ in range(c.layers))
        self.norm_out = nn.LayerNorm(c.width)

    def blocks(self, x, mask=None):
        """x (B, L, width), mask (B, L) -> (B, L, width)."""
        for i, (attn, ff) in enumerate(zip(self.attns, self.ffs)):
            x = x + attn(self.norms[2 * i](x), mask=mask)
            x = x + ff(self.norms[2 * i + 1](x))
        return self.norm_out(x)


class SentenceEncoder(Blocks):
    """Of a frozen MiniLM's sentences (text.kind minilm): tokens made of a sentence and of the concepts next to it.

    concepts: sentences of the training concepts and, first, of "" (learnt_concepts). A text is compared with them all,
    as by the posterior of a sentence under noise of deviation one: so words that were never trained on are read as the
    concepts that mean nearly the same. What else the sentence says is read from itself, which trains under noise
    (train.py's text_noise) of the size by which people's words differ from captions."""

    def __init__(self, c):
        super().__init__(c)
        self.tokens, self.width = c.tokens, c.width
        self.register_buffer("concepts", torch.zeros(c.concepts, MiniLM.width))
        self.read = nn.Linear(2 * MiniLM.width, c.tokens * c.width)

    def nearest(self, sentences):
        """sentences (B, 384) -> weights of the concepts (B, concepts), float32."""
        return (-torch.cdist(sentences.float(), self.concepts.float()).square() / 2).softmax(-1)

    def forward(self, sentences):
        """sentences (B, 384) -> features (B, tokens, width), mask None."""
        known = self.nearest(sentences).to(sentences.dtype) @ self.concepts.to(sentences.dtype)
        x = self.read(torch.cat([known, sentences], -1))
        return self.blocks(x.unflatten(-1, (self.tokens, self.width))), None


def learnt_concepts(features, texts, most, base=None):
    """Sentences (n <= most, 384) for SentenceEncoder: of "", then the mean of each concept's texts.

    features (texts, 384) as cached; texts: data.StickerTexts. base (m, 384): the sentences of weights to start from,
    which stay; behind them come those of concepts that are none of theirs. Of more concepts than fit, evenly spaced
    ones are taken."""
    members = texts.stickers.members
    rows = [[row for i in numbers for row in texts.rows(int(i))] for numbers in members]
    means = [features[own].mean(0, dtype=np.float64) for own in rows]
    found = torch.from_numpy(np.stack(means).astype(np.float32))
    if base is None:
        known = torch.from_numpy(np.asarray(features[:1], np.float32))
    else:
        known = base.float()[:most]
        found = found[torch.cdist(found, known).square().amin(1) > SAME]
    return torch.cat([known, found[even_frames(len(found), most - len(known))]])


class TextEncoder(Blocks):
    """Of open_clip's tokens (text.kind small).

    vocabulary: the sorted tokens that have an embedding (data.vocabulary). Any other reads as "#", which word dropout
    trains to stand for a word that is not told."""

    def __init__(self, c):
        super().__init__(c)
        self.register_buffer("vocabulary", torch.arange(c.vocab))
        self.token = nn.Embedding(c.vocab, c.width)
        self.position = nn.Parameter(torch.randn(c.length, c.width) * 0.02)
        nn.init.normal_(self.token.weight, std=0.3)  # captions are told apart by their words from the first step

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

    def forward(self, tokens):
        """tokens (B, L) int64 -> features (B, L', width) and mask (B, L'), cut to the longest caption.

        Tokens end with their first END; 0 is padding behind it, and "!" before it."""
        lengths = (tokens == END).int().argmax(1) + 1
        tokens = tokens[:, :int(lengths.max())]
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return self.blocks(self.token(self.rows(tokens)) + self.position[:tokens.shape[1]], mask), mask
