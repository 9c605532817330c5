"""Large images where something small decides. Image i of a split is always the same, and made when it is asked for.

    needle    one red digit, named                                        10 classes
    several   five red digits, three of them the same: which one?         10 classes

The digits are scikit-learn's (8 x 8 pixels), drawn 8 to 12 pixels high at any place, at 60 to 100% of full brightness. On a
canvas of noise lie, besides: eight red decoys (fewer below 256 pixels), each a digit whose pixels are shuffled, as red and as large as the others, and digits in four other colours, one for each 32 x 32 pixels. Red things do not
overlap. Canvases of 32 and 64 pixels hold one red digit in both tasks.
Shrunk four times, a red digit and a decoy are both red spots of 2 x 2 or 3 x 3 pixels: a thumbnail says where to look, hardly what is there.
Source digits of each split: train 1,200, valid 300, test 297. A canvas of 256 pixels has one pixel of the needle in about 650,
one of 1,024 pixels one in 10,500.
"""
import numpy as np, torch
from PIL import Image
from sklearn.datasets import load_digits

parts = dict(train=(0, 1200), valid=(1200, 1500), test=(1500, 1797))
sizes = range(8, 13)
red = np.array([1, .3, .3])
tints = np.array([[1, 1, 1], [.3, 1, .3], [.3, .4, 1], [1, 1, .3]])

class Canvases:
    "A split of a task at one size"
    classes = [*'0123456789']
    def __init__(self, task, split, side, seed=0):
        d = load_digits(); low, high = parts[split]
        self.y, pixels = d.target[low:high], (d.images[low:high]*255/16).astype(np.uint8)
        flat = pixels.reshape(len(pixels), 64)
        shuffled = np.random.default_rng(0).permuted(flat, axis=1).reshape(-1, 8, 8)
        def drawn(kind): return {s: [np.asarray(Image.fromarray(p).resize((s, s), Image.BILINEAR)) for p in kind] for s in sizes}
        self.digits, self.decoys = drawn(pixels), drawn(shuffled)
        self.of = [np.flatnonzero(self.y == c) for c in range(10)]
        self.task, self.side, self.seed = task, side, (seed, low, side)

    def __getitem__(self, i):
        "(side, side, 3) uint8, the class, and the middles (row, column) of the red digits"
        rng, side = np.random.default_rng([*self.seed, i]), self.side
        if self.task == 'several' and side > 64: a, b, c = rng.choice(10, 3, replace=False); names = [a, a, a, b, c]
        else: names = [rng.integers(10)]
        decoys, others, n = min(8, side//20 - 1), (side//32)**2, len(self.y)
        things = [(self.digits, rng.choice(self.of[c]), red) for c in names]
        things += [(self.decoys, rng.integers(n), red) for _ in range(decoys)]
        k = len(things)
        things += [(self.digits, rng.integers(n), tints[rng.integers(4)]) for _ in range(others)]
        s, bright = rng.choice(sizes, len(things)), rng.uniform(.6, 1, len(things))
        place = lambda j: (rng.random(2)*(side - s[j] + 1)).astype(int)
        at = [place(j) for j in range(len(things))]
        for j in range(1, k):
            for _ in range(50):
                if (abs(np.array(at[:j]) - at[j]).max(1) >= 13).all(): break
                at[j] = place(j)
        noise = rng.integers(0, 64, (64, 64, 3), np.uint8); tiles = -(-side//64)
        x = np.tile(noise, (tiles, tiles, 1))[:side, :side].copy()
        for j in reversed(range(len(things))):
            kind, i, tint = things[j]; ink = kind[s[j]][i][..., None]; r, c = at[j]
            spot = x[r:r+s[j], c:c+s[j]]; colour = (ink*(tint*bright[j])).astype(np.uint8)
            spot[:] = np.where(ink > 40, colour, np.minimum(spot, 64)) if j < k else np.maximum(spot, colour)
        return x, int(names[0]), np.array(at[:len(names)]) + s[:len(names), None]//2

    def batch(self, numbers):
        "(B, 3, side, side) uint8, (B,), (B, digits, 2)"
        x, y, at = zip(*(self[int(i)] for i in numbers))
        return torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2), torch.tensor(y), torch.from_numpy(np.stack(at))
