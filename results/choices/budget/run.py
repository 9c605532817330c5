"""How should an untaught scorer begin, and what would a duller way give for the same training time? A small timm ViT on
64-pixel scenes, trained on four fifths of the *training* images; every figure is of the fifth that is held out. One rest token (`cells=1`).

    python run.py DATA base              24 epochs: base.pt                                          25 minutes
    python run.py DATA start             untaught, with rules for the scores                          3 minutes
    python run.py DATA taught SEED       `teach`, two epochs                                          4 minutes each
    python run.py DATA blocks SEED       the first 3 of 6 blocks, for the same CPU time               4 minutes each
    python run.py DATA small SEED        images of 32 pixels, 16 tokens, for the same CPU time        4 minutes each
    python run.py DATA time              share of the ViT's time for an answer, in turns, idle cores  1 minute

Each appends lines to lines.csv (what, blocks before the budget, seed, accuracy for each of `ks` kept, CPU seconds), `time` to
time.csv (batch, what, milliseconds, share of the ViT's). One thread, float32.
"""
import csv, sys, time
from pathlib import Path
import timm, torch, torch.nn.functional as F
from fastai.torch_core import set_seed
from statistics import median
from timm.layers import set_fused_attn
from torch import nn
from sigma_tokenizer.budget import budgeted, teach
from sigma_tokenizer.checkpoint import train
from sigma_tokenizer.data import image_loaders
from sigma_tokenizer.evaluation import in_turns
from sigma_tokenizer.repro.folders import hold_out, load_data
from sigma_tokenizer.select import TopK
from sigma_tokenizer.training import BudgetSchedule, create_learner

here = Path(__file__).resolve().parent
ks = [None, 48, 32, 16, 8, 4, 1, 0]
budgets = [k if k is None else TopK(k) for k in ks]
recipe = dict(num_classes=6, img_size=64, patch_size=8, embed_dim=96, depth=6, num_heads=3)

def make(trained=True, **kw):
    vit = timm.create_model('vit_tiny_patch16_224', **recipe | kw)
    if trained:
        state = timm.models.vision_transformer.checkpoint_filter_fn(torch.load(here/'base.pt', weights_only=True), vit)
        vit.load_state_dict(state, strict=False)
    return vit

class Rule(nn.Module):
    "Scores by a rule of the hidden states (B, N, D), from 0 to 1"
    def __init__(self, rule): super().__init__(); self.rule = rule
    def forward(self, t):
        s = self.rule(t.x); s = s - s.amin(1, keepdim=True)
        return t.replace(scores=(s/s.amax(1, keepdim=True).clamp(min=1e-9)).clamp(.02, 1))

def neighbours(x):
    "How far a token is from the mean of its neighbours"
    side = int(x.shape[1]**.5); grid = F.normalize(x, dim=-1).mT.unflatten(2, (side, side))
    return 1 - F.cosine_similarity(grid, F.avg_pool2d(grid, 3, 1, 1, count_include_pad=False), dim=1).flatten(1)

def class_attention(vit, after):
    "How much the class token looks at each token, in the last block that sees all (EViT)"
    attn, seen = vit.blocks[after - 1].attn, {}
    attn.qkv.register_forward_hook(lambda module, inp, out: seen.update(qkv=out))
    def rule(x):
        q, k, _ = seen['qkv'].unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        return torch.einsum('bhd,bnhd->bhn', q[:, 0]*q.shape[-1]**-.5, k).softmax(-1).mean(1)[:, 1:]
    return rule

def write(what, after, seed, accuracy, seconds=''):
    row = [what, after, seed, *accuracy, *['']*(len(ks) - len(accuracy)), seconds]
    with open(here/'lines.csv', 'a') as f: csv.writer(f).writerow(row)
    print(what, after, seed, accuracy, seconds, flush=True)

@torch.no_grad()
def evaluate(model, batches, n):
    right = sum((model.eval()(x, budgets) if n > 1 else model.eval()(x)[None]).argmax(-1).eq(y).sum(1) for x, y in batches)
    return [round(r/sum(len(y) for _, y in batches), 4) for r in right.tolist()]

def main(data, what, seed=239):
    torch.set_num_threads(1); set_fused_attn(what == 'time')  # in training on a CPU the other is faster
    if what == 'time': return share()
    seed, side = int(seed), 32 if what == 'small' else 64
    data = hold_out(load_data(data, side), .2); set_seed(seed, reproducible=True)
    dls = image_loaders(data, 64, augment='resized_crop'); batches = [*dls.valid]
    if what == 'base':
        vit = make(False); train(create_learner(vit, dls, .05), 24, 1e-3, 'one_cycle', path=here/'base.ckpt')
        torch.save(vit.state_dict(), here/'base.pt'); return write('base', '', seed, evaluate(vit, batches, 1))
    if what == 'start': return start(batches)
    if what == 'taught':
        model = budgeted(make(), 2, cells=1); begin = time.process_time()
        teach(model, dls, schedule=BudgetSchedule(full=0.)); return write(what, 2, seed, evaluate(model, batches, 8), round(time.process_time() - begin))
    vit = make(**dict(depth=3) if what == 'blocks' else dict(img_size=32))
    learn = create_learner(vit, dls, .05); begin, steps = time.process_time(), 20
    for x, y in [*zip(range(steps), dls.train)]: vit.train()(y[0]).sum().backward()  # how long does a step take?
    step = (time.process_time() - begin)/steps; vit.zero_grad()
    epochs = max(1, round(teaching/(step*len(dls.train)))); set_seed(seed, reproducible=True); begin = time.process_time()
    train(learn, epochs, 3e-4, 'one_cycle')
    write(f'{what}, {epochs} epochs', '', seed, evaluate(vit, batches, 1), round(time.process_time() - begin))

teaching = 158  # CPU seconds of `taught`

def start(batches):
    for after in (1, 2, 3):
        vit = make().eval(); model = budgeted(vit, after, cells=1)
        mlp = model.scorer.mlp[-1]; model.scorer.eval()
        torch.manual_seed(0); write('even', after, '', evaluate(model, batches, 8))
        nn.init.kaiming_uniform_(mlp.weight, 5**.5); write('random weights', after, '', evaluate(model, batches, 8))
        for name, rule in {'at random': lambda x: torch.rand(x.shape[:2]), 'norm': lambda x: x.norm(dim=-1),
                           'far from the mean': lambda x: 1 - F.cosine_similarity(x, x.mean(1, keepdim=True), dim=-1),
                           'far from its neighbours': neighbours, 'class attention': class_attention(vit, after)}.items():
            model.scorer = Rule(rule); write(name, after, '', evaluate(model, batches, 8))

@torch.no_grad()
def share():
    for batch in (1, 32):
        x, vit = torch.rand(batch, 3, 64, 64), make(False).eval(); model = budgeted(make(False), 2, cells=1).eval()
        calls = {'vit': lambda: vit(x), 'blocks': (lambda m: lambda: m(x))(make(False, depth=3).eval()),
                 'small': (lambda m, z: lambda: m(z))(make(False, img_size=32).eval(), x[..., :32, :32].contiguous())}
        calls |= {f'TopK({k})': lambda k=k: model(x, TopK(k)) for k in ks[1:]} | {'all': lambda: model(x, None)}
        ms = {name: median(rounds) for name, rounds in in_turns(calls, 31).items()}
        with open(here/'time.csv', 'a') as f:
            for name, t in ms.items(): csv.writer(f).writerow([batch, name, round(t, 3), round(t/ms['vit'], 3)])

if __name__ == '__main__': main(*sys.argv[1:])
