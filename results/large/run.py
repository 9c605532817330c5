"""Small things on large images (tasks.py): our glimpses beside every duller way.  nbs/34_large.ipynb shows what came out.

    python run.py TASK NAME[@SEED]...    train and evaluate: TASK/NAME@SEED.json and .npz    about 8 minutes each on one core
    python run.py time                   time.json: milliseconds and memory of an answer; on a machine that does nothing else

TASK: needle or several. NAME:

    glimpse       ours: create_model('glimpse'), patches of 16 pixels, read with 14 more around; LookLoss, which reads
                  all patches of canvases up to 128 pixels, and then only 4 to 32
    random        the same model, trained by cross-entropy alone on 1 to 32 patches drawn at random
    sampling      our two networks in attention sampling (Katharopoulos and Fleuret, 2019): 16 patches drawn from the look's
                  softmax, their mean; in evaluation the 16 highest, weighted
    cnn, cnn-mean a plain CNN (four stages of two convolutions, 16 to 128 channels), global maximum or mean
    cnn-W         cnn with W channels in its first stage, for less time
    reader        the network that reads our patches, all over the image, global maximum
    shrunk-S      cnn on the image shrunk S times
    histogram     logistic regression on the histograms of red, green and blue, 16 bins each
    vit           patches of 16 pixels, each through a linear layer; three blocks as in ours

Everyone is trained on canvases of 32, 64, 128, 256 and 512 pixels in turn (one cycle each) for about the same CPU time
(`seconds`, by a short timing of the steps; what a run really took is in its file), in bfloat16, and evaluated on test images of
256, 512 and 1,024 pixels (1,000, 500, 250) after the stage of that size. Those that read 16 patches also train at 1,024 pixels
(`ours`); for the others that is too slow, so they come there from 512. `oracle` in its file: the same weights, whose scores are
high where the middle of a red digit is. Choices were made on `valid`.
"""
import json, sys, time
from pathlib import Path
import numpy as np, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F
from sigma_tokenizer import TopK, create_model
from sigma_tokenizer.bench import gflop, peak_memory
from sigma_tokenizer.evaluation import in_turns
from sigma_tokenizer.repro.runs import provenance
from sigma_tokenizer.stem import channels_last, cnn_stage
from sigma_tokenizer.tokens import imagenet_normalize
from sigma_tokenizer.training import BFloat16, BudgetSchedule, LookLoss, autocast, create_learner
from sigma_tokenizer.training import Batches as Stream

here = Path(__file__).resolve().parent; sys.path.insert(0, str(here))
from tasks import Canvases

seconds = {32: 70, 64: 90, 128: 90, 256: 90, 512: 80}  # of CPU time; ours spends them on smaller canvases
ours = {32: 60, 64: 110, 128: 120, 256: 50, 512: 50, 1024: 30}
batch = {32: 128, 64: 64, 128: 32, 256: 16, 512: 8, 1024: 4}
tests = {256: 1000, 512: 500, 1024: 250}
ks = [64, 32, 16, 8, 4, 2, 1]
kind = dict(image_size=256, patch_size=16, num_classes=10, embed_dim=128, depth=3, num_heads=4, drop_rate=0.)

class CNN(nn.Module):
    def __init__(self, pool='max', shrink=1, width=16):
        super().__init__(); widths = [width*2**i for i in range(4)]
        self.pool, self.shrink = pool, shrink
        self.stages, self.head = nn.Sequential(*map(cnn_stage, [3, *widths], widths)), nn.Linear(widths[-1], 10)
    def forward(self, x):
        if self.shrink > 1: x = F.avg_pool2d(x, self.shrink)
        y = self.stages(channels_last(x)); return self.head(y.amax((2, 3)) if self.pool == 'max' else y.mean((2, 3)))

class Reader(nn.Module):
    def __init__(self): super().__init__(); self.tokenizer, self.head = create_model('glimpse', **kind).tokenizer, nn.Linear(128, 10)
    def forward(self, x):
        t = self.tokenizer
        return self.head(t.pixels(channels_last(F.pad(x, [t.margin]*4))).amax((2, 3)))

class Sampling(nn.Module):
    "Attention sampling: k patches drawn with replacement from the look's softmax a; the mean of their features is unbiased for"
    "the attention's, and so is its gradient: features f carry that of a as f a/a.detach()"
    k = 16
    def __init__(self):
        super().__init__(); self.tokenizer = create_model('glimpse', **kind).tokenizer
        self.score, self.head = nn.Linear(128, 1), nn.Linear(128, 10)
    def forward(self, x, k=None):
        t = self.tokenizer(x); a = self.score(t.x)[..., 0].float().softmax(1)
        k = min(k or self.k, a.shape[1]); at = torch.multinomial(a, k, replacement=True); p = a.gather(1, at)
        if not self.training: at = a.topk(k)[1]; p = a.gather(1, at)
        f = self.tokenizer.pixels(self.tokenizer.windows(x, at, t.grid)).flatten(1).unflatten(0, at.shape)
        w = p/p.detach()/at.shape[1] if self.training else p/p.sum(1, keepdim=True)
        return self.head((f*w[..., None]).sum(1))

class Random(nn.Module):
    effect = 'attention'
    def __init__(self): super().__init__(); self.bias = nn.Parameter(torch.zeros(1))
    def forward(self, t): return t.replace(scores=torch.rand(t.x.shape[:2])*.01 + .005 + 0*self.bias)

def make(name):
    if name == 'glimpse' or name == 'random':
        m = create_model('glimpse', reduction='rest', **kind)
        if name == 'random': m.scorer = Random()
        return m
    if name == 'sampling': return Sampling()
    if name == 'reader': return Reader()
    if name == 'vit': return create_model('vit', **kind)
    if name.startswith('shrunk'): return CNN(shrink=int(name.split('-')[1]))
    return CNN('mean' if name == 'cnn-mean' else 'max', width=int(name[4:]) if name[4:].isdigit() else 16)

class Batches:
    def __init__(self, task, side, steps, start): self.data, self.steps, self.start, self.bs = Canvases(task, 'train', side), steps, start, batch[side]
    def __len__(self): return self.steps
    def __iter__(self):
        for s in range(self.steps):
            x, y, _ = self.data.batch(range(self.start + s*self.bs, self.start + (s + 1)*self.bs))
            yield imagenet_normalize(x/255), y

def fit(learn, batches, lr):
    learn.dls = DataLoaders(Stream(batches), Stream(()))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, lr)

@torch.no_grad()
def evaluate(m, name, task, split, side, n):
    "Accuracy by budget, and the predictions"
    m.eval(); data, found = Canvases(task, split, side), {}
    add = lambda key, logits: found.setdefault(key, []).append(logits.float().argmax(-1))
    for i in range(0, n, 10):
        x, y, at = data.batch(range(i, i + 10)); x = imagenet_normalize(x/255); found.setdefault('labels', []).append(y)
        with autocast('cpu', 'bfloat16'):
            if name in ('glimpse', 'random'):
                t = m.embed(x)
                for k in ks: add(str(k), m.head(m.encode(m.reduce(t, k and TopK(k)))))
                if name == 'glimpse':
                    cells = (at//16)[..., 0]*(side//16) + (at//16)[..., 1]
                    told = t.scores*.5 + torch.zeros_like(t.scores).scatter(1, cells, .5)
                    found.setdefault('found', []).append(m.reduce(t, TopK(16)).position[:, 1:, None].eq(cells[:, None]).any(1).float().mean(1))
                    for k in ks: add(f'oracle {k}', m.head(m.encode(m.reduce(t.replace(scores=told), TopK(k)))))
            elif name == 'sampling':
                for k in ks: add(str(k), m(x, k))
            else: add('all', m(x))
    found = {k: torch.cat(v).numpy() for k, v in found.items()}
    hit = {k: round(float((v == found['labels']).mean()), 4) for k, v in found.items() if k not in ('labels', 'found')}
    return hit | ({'found': round(float(found.pop('found').mean()), 4)} if 'found' in found else {}), found

def run(task, name, seed, split='test', out=here):
    torch.set_num_threads(1); set_seed(seed, reproducible=True)
    m, start, log, arrays, accuracy = make(name), 0, [], {}, {}
    lr = dict(vit=5e-4).get(name, 2e-3)
    look = LookLoss(BudgetSchedule(1, 32, 0.))
    plan = ours if name in ('glimpse', 'random', 'sampling') else seconds
    for side, budget in plan.items():
        look.alone = .7*(side == 32)
        if side > 128: look.kept, look.schedule = True, BudgetSchedule(4, 32, 0.)
        cbs = [BFloat16()] + [look]*(name == 'glimpse')
        if name == 'random': cbs.append(RandomReading())
        learn = create_learner(m, Batches(task, side, 1, 0), wd=.01, cbs=cbs)
        state = {k: v.clone() for k, v in m.state_dict().items()}
        fit(learn, Batches(task, side, 3, 10**6), 1e-9); then = time.process_time()
        fit(learn, Batches(task, side, 6, 10**6), 1e-9); m.load_state_dict(state)
        steps = int(budget/(time.process_time() - then)*6); then = time.process_time()
        fit(learn, Batches(task, side, steps, start), lr/(1 if side < 128 else 2 if side == 128 else 5)); start += steps*batch[side]
        log.append(dict(side=side, steps=steps, images=steps*batch[side], seconds=round(time.process_time() - then, 1)))
        for s in [side, 1024][:1 + (side == max(plan) == 512)]:
            if s not in tests: hit, _ = evaluate(m, name, task, 'valid', s, 300); print(name, seed, s, 'valid', hit, log[-1], flush=True); continue
            hit, found = evaluate(m, name, task, split, s, tests[s]); accuracy[s] = hit
            arrays |= {f'{k}@{s}': v.astype(np.int8) for k, v in found.items()}
            print(name, seed, s, hit, log[-1], flush=True)
    folder = out/task; folder.mkdir(exist_ok=True, parents=True); path = folder/f'{name}@{seed}'
    about = dict(task=task, name=name, seed=seed, split=split, accuracy=accuracy, stages=log, **provenance('cpu'))
    np.savez_compressed(f'{path}.npz', **arrays); Path(f'{path}.json').write_text(json.dumps(about, indent=1) + '\n')
    if name == 'glimpse': torch.save({k: v.half() if v.is_floating_point() else v for k, v in m.state_dict().items()}, f'{path}.pt')

def histogram(task):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    def read(split, side, n):
        data = Canvases(task, split, side); images = [data[i] for i in range(n)]
        return np.stack([np.concatenate([np.histogram(x[..., c], 16, (0, 256))[0] for c in range(3)]) for x, *_ in images]), [y for _, y, _ in images]
    accuracy = {}
    for side, n in tests.items():
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*read('train', side, 2000 if side < 1024 else 500))
        accuracy[side] = {'all': round(model.score(*read('test', side, n)), 4)}
    print(accuracy); (here/task).mkdir(exist_ok=True)
    about = dict(task=task, name='histogram', seed=239, split='test', accuracy=accuracy, **provenance('cpu'))
    (here/task/'histogram@239.json').write_text(json.dumps(about, indent=1) + '\n')

class RandomReading(Callback):
    "Random scores teach nothing: read a random number of random patches"
    order = 90
    def before_batch(self):
        if self.training: self.learn.xb = (*self.xb, BudgetSchedule(1, 32, 0.).draw(64))

def limit(tokenizer, x, k):
    "What cannot be saved: each pixel shrunk once, and k windows copied"
    side = x.shape[-1]//16
    at = torch.arange(k)[None]*(side*side//k); return tokenizer.thumbnail(x), tokenizer.windows(x, at, (side, side))

@torch.no_grad()
def times():
    "Milliseconds (median of 7 rounds, of long calls 3, in turns) and peak MiB of one image, float32, one thread"
    torch.set_num_threads(1); rows = []
    for side in (256, 512, 1024, 2048):
        x = imagenet_normalize(torch.rand(1, 3, side, side)); m = {n: make(n).eval() for n in ('glimpse', 'cnn', 'cnn-4', 'shrunk-2', 'shrunk-4', 'vit')}
        calls = {f'glimpse {k}': lambda k=k: m['glimpse'](x, TopK(k)) for k in (0, 4, 16, 64)}
        calls |= {'limit 16': lambda: limit(m['glimpse'].tokenizer, x, 16)}
        calls |= {n: lambda n=n: m[n](x) for n in ('cnn', 'cnn-4', 'shrunk-2', 'shrunk-4')}
        if side < 2048:
            calls['glimpse all'] = lambda: m['glimpse'](x, None)
            msvd = create_model('msvd_weighted', reduction='rest', **kind).eval()
            calls |= {'vit': lambda: m['vit'](x), 'msvd all': lambda: msvd(x), 'msvd 16': lambda: msvd(x, TopK(16))}
        few = side < 1024
        rounds = in_turns({k: c for k, c in calls.items() if few or k not in ('vit', 'glimpse all', 'msvd all', 'msvd 16', 'cnn')}, 7)
        rounds |= in_turns({k: c for k, c in calls.items() if k not in rounds}, 3)
        for name, call in calls.items():
            rows.append(dict(side=side, name=name, ms=round(float(np.median(rounds[name])), 2),
                             mib=round(peak_memory(call)/2**20, 2), gflop=gflop(call)))
            print(rows[-1], flush=True)
    (here/'time.json').write_text(json.dumps(dict(rows=rows, **provenance('cpu')), indent=1) + '\n')

if __name__ == '__main__':
    task, *names = sys.argv[1:]
    if task == 'time': times()
    for n in names if task != 'time' else ():
        name, _, seed = n.partition('@')
        if name == 'histogram': histogram(task)
        else: run(task, name, int(seed or 239))
