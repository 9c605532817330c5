"""A budget for a small timm ViT, beside every duller way to the same time.  nbs/33_timm_budget.ipynb shows what came out.

    python run.py DATA TASK base             train the ViT: TASK/base.pt (float16), .json, .npz          1 hour, 25 minutes
    python run.py DATA TASK NAME[@SEED]...   teach it, evaluate: TASK/NAME@SEED.json and .npz            5 minutes each
    python run.py DATA TASK untaught NAME... the same without teaching                                   seconds
    python run.py DATA time MODEL            time-MODEL.json: milliseconds, for small, deit_small, vit_base; on a machine
                                             that does nothing else                                    8 minutes each

TASK: `scenes`, four fifths of Intel's training images at 64 pixels, or `needle` (needle.py; DATA does not matter). One
thread, float32, seed 239 unless said. No choice was made on test images. NAME:

    ours-A       budgeted(vit, after=A); ours1-A has one rest token (cells=1), cut4-A the first four blocks alone
    chance-A     the same, but the scores are random
    pool-A       means over a grid of cells instead
    tome, evit   token merging (Bolya et al. 2023), class attention (EViT, Liang et al. 2022), taught in the same way
    sizes        one model for all sizes of the input, taught in the same way
    exit-D       the first D blocks, trained further
    small-S      the input shrunk to S pixels, trained further

Each trains for about the CPU time of ours-1, 4 epochs (`epochs`, from the time of a step and 0.03 s to
load its images).
"""
import json, math, random, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, timm, torch
from fastai.torch_core import set_seed
from timm.layers import set_fused_attn
from torch import nn
from torch.nn import functional as F
from sigma_tokenizer.budget import budgeted, teach
from sigma_tokenizer.checkpoint import train
from sigma_tokenizer.data import image_loaders
from sigma_tokenizer.evaluation import in_turns
from sigma_tokenizer.reduce import GridPool
from sigma_tokenizer.repro.folders import hold_out, load_data
from sigma_tokenizer.repro.runs import provenance
from sigma_tokenizer.select import TopK
from sigma_tokenizer.training import SelfDistillation, create_learner

here = Path(__file__).resolve().parent
sys.path[:0] = str(here), str(here.parent)
from needle import Loader, as_input, needles
from token_merging import merge_tokens

side = dict(scenes=64, needle=96)  # pixels; 8 x 8 tokens of each
recipe = dict(embed_dim=96, depth=6, num_heads=3)
ks = [None, 40, 32, 24, 16, 12, 8, 4, 2, 0]
budgets = dict(ours=ks, cut4=ks, ours1=[None, 56, 48, 40, 32, 24, 16, 8, 4, 0], chance=ks, pool=[None, 49, 36, 25, 16, 9, 4, 1],
               tome=[0, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 32], evit=[1, .9, .8, .7, .6, .5, .4, .3, .2],
               sizes=[8, 7, 6, 5, 4, 3, 2])
epochs = {'ours': 4, 'cut4': 6, 'ours1': 5, 'chance': 4, 'pool': 5, 'tome': 4, 'evit': 4, 'sizes': 5, 'exit-1': 21, 'exit-2': 14,
          'exit-3': 10, 'exit-4': 8, 'exit-5': 7, 'small-24': 22, 'small-32': 16, 'small-40': 12, 'small-48': 9}
needle_epochs = {'small-48': 16, 'small-72': 9}  # 4 x 4 and 6 x 6 tokens

def make(task, state=None, **kw):
    size = dict(img_size=side[task], patch_size=side[task]//8, num_classes=dict(scenes=6, needle=10)[task])
    vit = timm.create_model('vit_tiny_patch16_224', **size | recipe | kw)
    if state:
        state = timm.models.vision_transformer.checkpoint_filter_fn({k: v.float() for k, v in state.items()}, vit)
        vit.load_state_dict(state, strict=False)  # of fewer blocks
    return vit

class Rule(nn.Module):
    "A model whose budgets are numbers; None is the whole of it"
    n_tokens = 64
    def __init__(self, vit): super().__init__(); self.vit = vit
    def forward(self, x, b):
        if isinstance(b, list): return torch.stack([self(x, one) for one in b])
        return self.at(x, self.full if b is None else b)

class ToMe(Rule):
    "r tokens of each block are averaged into others most like them"
    full = 0
    def at(self, x, r):
        v = self.vit; x = v.norm_pre(v._pos_embed(v.patch_embed(x))); size = x.new_ones(*x.shape[:2], 1)
        for b in v.blocks:
            n, a = min(r, (x.shape[1] - 1)//2), b.attn
            q, k, val = a.qkv(b.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weight = size.log().mT[:, None].to(q.dtype) if r else None
            h = F.scaled_dot_product_attention(q, k, val, attn_mask=weight)
            x = x + a.proj(h.transpose(1, 2).flatten(2))
            if n: x, size = merge_tokens(x, size, k.mean(1), n)
            x = x + b.mlp(b.norm2(x))
        return v.forward_head(v.norm(x))

class EViT(Rule):
    "In blocks at a quarter, half and three quarters of the depth a share of the tokens is kept, the others fused to one"
    full = 1
    def at(self, x, share):
        v = self.vit; x = v.norm_pre(v._pos_embed(v.patch_embed(x))); depth = len(v.blocks); fused = False
        for i, b in enumerate(v.blocks):
            a = b.attn; q, k, val = a.qkv(b.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(q, k, val)
            x = x + a.proj(h.transpose(1, 2).flatten(2))
            if share < 1 and i in (depth//4, depth//2, 3*depth//4):  # after attention, before the MLP
                looks = (q[:, :, :1] @ k.mT*q.shape[-1]**-.5).softmax(-1)[:, :, 0, 1:].mean(1)
                n = math.ceil(share*looks.shape[1]); order = looks.argsort(1, descending=True)
                take = lambda t, i: t.gather(1, i[..., None].expand(-1, -1, t.shape[2]))
                rest = (take(x[:, 1:], order[:, n:])*looks.gather(1, order[:, n:])[..., None]).sum(1, keepdim=True)
                x = torch.cat([x[:, :1], take(x[:, 1:], order[:, :n]), rest], 1)
            x = x + b.mlp(b.norm2(x))
        return v.forward_head(v.norm(x))

class Sizes(Rule):
    "The input is shrunk to `cells` x `cells` patches"
    full = 8
    def __init__(self, vit): super().__init__(vit); self.patch = vit.patch_embed.patch_size[0]
    def at(self, x, cells):
        side = cells*self.patch
        return self.vit(x if side == x.shape[-1] else F.interpolate(x, (side, side), mode='bilinear', antialias=True))

class Random(nn.Module):
    def forward(self, t): return t.replace(scores=torch.rand(t.x.shape[:2]))

class Pool(nn.Module):
    "Means over the largest square of cells within the budget"
    def cells_of(self, grid, device=None):
        return torch.zeros(grid[0]*grid[1], dtype=torch.int64), torch.zeros(self.cells, dtype=torch.int64)
    def forward(self, t, keep):
        short = GridPool()(t, keep); self.cells = short.x.shape[1]; return short

def model_of(task, name, state):
    "The model of a name, before it is taught, and its budgets"
    rule, _, n = name.partition('-')
    if rule in ('exit', 'small'):
        if rule == 'exit': return make(task, state, depth=int(n)), [None]
        vit = make(task, state, img_size=int(n)); return Shrunk(vit, int(n)), [None]
    if rule == 'tome': m = ToMe(make(task, state))
    elif rule == 'evit': m = EViT(make(task, state))
    elif rule == 'sizes': m = Sizes(make(task, state, dynamic_img_size=True))
    else:
        depth = 4 if rule == 'cut4' else 6
        m = budgeted(make(task, state, depth=depth), int(n), cells=1 if rule == 'ours1' else 4)
        if rule == 'chance': m.scorer = Random()
        if rule == 'pool': m.scorer, m.rest = Random(), Pool()
        return m, [b if b is None else TopK(b) for b in budgets[rule]]
    return m, budgets[rule]

class Shrunk(nn.Module):
    def __init__(self, vit, side): super().__init__(); self.vit, self.side = vit, side
    def forward(self, x): return self.vit(F.interpolate(x, (self.side, self.side), mode='bilinear', antialias=True))

class Draw:
    "A schedule: one of the budgets but the first"
    def __init__(self, budgets): self.budgets = budgets[1:]
    def draw(self, n): return random.choice(self.budgets)

def learn(m, task, name, dls, all_budgets):
    "Teach a model; its log"
    rule = name.partition('-')[0]
    if rule in ('ours', 'ours1', 'cut4'): return teach(m, dls, epochs[rule])
    cbs = [SelfDistillation(Draw(all_budgets))] if len(all_budgets) > 1 else []
    n = (epochs | (needle_epochs if task == 'needle' else {}))[name if '-' in name and rule in ('exit', 'small') else rule]
    return train(create_learner(m, dls, .05, cbs), n, 3e-4, 'one_cycle')

def loaders(data, task, seed):
    "Training batches, and batches (x, y) that are held out, and of the test split"
    set_seed(seed, reproducible=True)
    if task == 'scenes':
        whole = load_data(data, 64); part = hold_out(whole, .2)
        dls, test = (image_loaders(d, 64, augment='resized_crop') for d in (part, whole))
        return dls, [*dls.valid], [*test.valid]
    def fixed(split):
        X, Y, _ = needles(3000, split)
        return [(as_input(X[i:i+250]), torch.from_numpy(Y[i:i+250])) for i in range(0, 3000, 250)]
    return Loader(seed=seed), fixed('valid'), fixed('test')

@torch.no_grad()
def evaluate(m, batches, all_budgets):
    m.eval(); torch.manual_seed(0); many = len(all_budgets) > 1
    preds = torch.cat([(m(x, all_budgets) if many else m(x)[None]).argmax(-1) for x, _ in batches], 1).numpy()
    labels = torch.cat([y for _, y in batches]).numpy()
    return preds, labels, [round(float((p == labels).mean()), 4) for p in preds]

def save(task, file, result, preds, labels, accuracy):
    result = dict(accuracy=accuracy) | result
    (here/task).mkdir(exist_ok=True)
    (here/task/f'{file}.json').write_text(json.dumps(result, indent=1) + '\n')
    np.savez_compressed(here/task/f'{file}.npz', preds=preds.astype(np.int8), labels=labels.astype(np.int8))
    print(task, file, result['accuracy'], flush=True)

def base(data, task, source):
    dls, held, test = loaders(data, task, 239); path = here/task/'base.pt'
    if task == 'scenes':
        vit = make(task); log = train(create_learner(vit, dls, .05), 60, 1e-3, 'one_cycle', path=path.with_suffix('.ckpt'))
    else: vit, log = needle_base(18)
    path.parent.mkdir(exist_ok=True); torch.save({k: v.half() for k, v in vit.state_dict().items()}, path)
    saved = make(task, torch.load(path, weights_only=True))
    result = dict(name='base', recipe=recipe, held_out=evaluate(saved, held, [None])[2], epochs=log, **source)
    save(task, 'base', result, *evaluate(saved, test, [None]))

def needle_base(epochs, per=250):
    torch.manual_seed(0); loader = Loader(steps=per*epochs); vit, log = make('needle'), []
    opt = torch.optim.AdamW(vit.parameters(), 1e-3, weight_decay=.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, 1e-3, total_steps=per*epochs, pct_start=.15); vit.train()
    for i, (x, y) in enumerate(loader):
        loss = F.cross_entropy(vit(x), y); opt.zero_grad(); loss.backward(); opt.step(); plan.step()
        if i % per == 0: log.append(dict(epoch=i//per, loss=0.))
        log[-1]['loss'] += loss.item()/per
    return vit, log

large = {'deit_small': 'deit_small_patch16_224', 'vit_base': 'vit_base_patch16_224'}

@torch.no_grad()
def time(model, source):
    "Milliseconds of an answer, all in turns; untrained weights take as long"
    rows = []
    def measure(batch, calls, rounds):
        for (name, b), ms in in_turns(calls, rounds).items():
            rows.append(dict(model=model, batch_size=batch, name=name, budget=b, ms=float(np.median(ms)), rounds=ms))
            print(*rows[-1].values(), flush=True)
    def budgeted_calls(name, m, x, all_budgets):
        m.eval()
        return {(name, b.k if isinstance(b, TopK) else b): (lambda: m(x)) if len(all_budgets) == 1 else lambda b=b: m(x, b)
                for b in all_budgets}
    for batch in (1, 8, 32) if model == 'small' else ():
        x = torch.randn(batch, 3, 64, 64); vit = make('scenes').eval(); calls = {('vit', None): lambda: vit(x)}
        for name in ('ours-1', 'cut4-1', 'ours1-1', 'pool-1', 'tome', 'evit', 'sizes', *(f'exit-{d}' for d in range(1, 6)),
                     *(f'small-{s}' for s in (24, 32, 40, 48))):
            calls |= budgeted_calls(name, *(lambda m, b: (m, x, b))(*model_of('scenes', name, make('scenes').state_dict())))
        measure(batch, calls, 31)
    for batch in (1, 8) if model in large else ():
        new = lambda **kw: timm.create_model(large[model], num_classes=10, **kw).eval()
        x = torch.randn(batch, 3, 224, 224); vit = new(); calls = {('vit', None): lambda: vit(x)}
        for after in (3, 4):
            calls |= budgeted_calls(f'ours-{after}', budgeted(new(), after), x, [None, *map(TopK, (96, 64, 48, 32, 16, 0))])
        calls |= budgeted_calls('tome', ToMe(new()), x, [0, 8, 16, 24])
        calls |= budgeted_calls('evit', EViT(new()), x, [.7, .5, .3])
        for d in (4, 6, 8, 10): calls |= budgeted_calls(f'exit-{d}', new(depth=d), x, [None])
        for s in (112, 144, 176): calls |= budgeted_calls(f'small-{s}', Shrunk(new(img_size=s), s), x, [None])
        measure(batch, calls, 7)
    (here/f'time-{model}.json').write_text(json.dumps(dict(rows=rows, threads=1, **source)) + '\n')

def main(data, task, *names):
    "Each result has the accuracy of the test images and of those held out, for each budget"
    torch.set_num_threads(1); set_fused_attn(True)
    source = provenance('cpu'); source['versions']['timm'] = timm.__version__
    if task == 'time': return time(*names, source)
    if names == ('base',): return base(data, task, source)
    untaught, state = names[0] == 'untaught', torch.load(here/task/'base.pt', weights_only=True)
    for name in names[untaught:]:
        name, _, seed = name.partition('@'); dls, held, test = loaders(data, task, int(seed or 239))
        m, all_budgets = model_of(task, name, state)
        log = [] if untaught else learn(m, task, name, dls, all_budgets)
        result = dict(name=name, seed=int(seed or 239), taught=not untaught, epochs=log,
                      budgets=[b.k if isinstance(b, TopK) else b for b in all_budgets],
                      held_out=evaluate(m, held, all_budgets)[2], **source)
        save(task, f'{name}-untaught' if untaught else f'{name}@{seed or 239}', result, *evaluate(m, test, all_budgets))

if __name__ == '__main__': main(*sys.argv[1:])
