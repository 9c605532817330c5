"""A task where something small decides: name the one red digit among 64 cells of 12 pixels with digits of other colours

The digits are scikit-learn's, 8 to 11 pixels high, at a random place in their cell; a cell that is not the red one's is
empty with probability 0.3. Each split has source digits of its own: the first 1,200, the next 300, the last 297.
"""
from functools import cache
import numpy as np, torch
from PIL import Image
from sklearn.datasets import load_digits

parts = dict(train=(0, 1200), valid=(1200, 1500), test=(1500, 1797))

@cache
def needles(n, split, canvas=96, cell=12, size=(8, 11), seed=0):
    "n images (n, 3, canvas, canvas) uint8, labels (n,), and the red digit's cell (n,)"
    digits = load_digits(); low, high = parts[split]
    images, y = digits.images[low:high]/16, digits.target[low:high]
    rng = np.random.default_rng([seed, low, canvas]); side = canvas//cell
    def resized(s): return [np.asarray(Image.fromarray((im*255).astype(np.uint8)).resize((s, s), Image.BILINEAR))
                            for im in images]
    ink = {s: np.stack(resized(s)).astype(np.float32) for s in range(size[0], size[1] + 1)}
    tints = np.array([[1, 1, 1], [.3, 1, .3], [.3, .4, 1], [1, 1, .3]])
    X = rng.integers(0, 64, (n, 3, canvas, canvas), dtype=np.uint8)
    Y, at = np.zeros(n, np.int64), rng.integers(0, side*side, n)
    for j in range(n):
        for k in range(side*side):
            red = k == at[j]
            if not red and rng.random() < .3: continue
            i, s = rng.integers(len(y)), int(rng.integers(size[0], size[1] + 1))
            r, c = k//side*cell + rng.integers(0, cell - s + 1), k % side*cell + rng.integers(0, cell - s + 1)
            colour = (np.array([1, .3, .3]) if red else tints[rng.integers(4)])*rng.uniform(.6, 1)
            place = X[j, :, r:r+s, c:c+s]; place[:] = np.maximum(place, ink[s][i]*colour[:, None, None])
            if red: Y[j] = y[i]
    return X, Y, at

def as_input(x): return (torch.from_numpy(x).float()/255 - .2)/.25

class Loader:
    "`steps` random batches of 64 in each epoch, of images made beforehand"
    def __init__(self, n=32000, split='train', steps=250, seed=1):
        (self.X, self.Y, _), self.steps, self.rng = needles(n, split), steps, np.random.default_rng(seed)
    def __len__(self): return self.steps
    def __iter__(self):
        for _ in range(self.steps):
            b = self.rng.integers(0, len(self.X), 64); yield as_input(self.X[b]), torch.from_numpy(self.Y[b])
