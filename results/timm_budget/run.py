"""A budget for a timm ViT, beside its rivals.  nbs/33_timm_budget.ipynb shows what came out.

    python run.py DATA base                train the ViT at full length: base.pt and base.json      45 minutes
    python run.py DATA teach NAME...       teach it, evaluate every budget: NAME.json and NAME.npz  7 minutes each
    python run.py DATA untaught NAME...    the same without teaching
    python run.py DATA time                time.json: milliseconds; on a machine that does nothing else

NAME is RULE-AFTER: ours-1, frozen-1 (only scorer and rest token learn), merge-1 (each dropped token is averaged into
the kept one most like it), attention-1 (EViT's rule, with its fused token), attention_dropped-1 (without), random-1,
random_rest-1 (with our rest token); tome (untaught); ours-1@240 is another seed than 239. One thread each.
"""
import json, sys
from pathlib import Path
import numpy as np, timm, torch
from fastai.torch_core import set_seed
from timm.layers import set_fused_attn
from torch import nn
from torch.nn import functional as F
from sigma_tokenizer.budget import budgeted, teach
from sigma_tokenizer.data import image_loaders
from sigma_tokenizer.repro.folders import load_data
from sigma_tokenizer.repro.runs import provenance
from sigma_tokenizer.select import TopK, keep_mask, select
from sigma_tokenizer.training import BFloat16, create_learner
from sigma_tokenizer.evaluation import in_turns
from sigma_tokenizer.checkpoint import train

here, seed = Path(__file__).resolve().parent, 239
sys.path.insert(0, str(here.parent))
from token_merging import merge_tokens

recipe = dict(img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3)
ks = [None, 48, 40, 32, 24, 16, 8, 4, 1]
rs = [0, 4, 8, 10, 12, 14, 16, 20, 24, 32]  # the blocks merge fewer where fewer are left

def make(): return timm.create_model('vit_tiny_patch16_224', num_classes=6, **recipe)

class ClassAttention(nn.Module):
    "EViT's rule: how much the class token looks at each token, in the last block that sees all"
    def __init__(self, vit, after):
        super().__init__()
        attn = vit.blocks[after - 1].attn
        attn.qkv.register_forward_hook(self.see)
        self.heads = attn.num_heads

    def see(self, module, inp, out): self.qkv = out.detach()

    def forward(self, t):
        q, k, _ = self.qkv.float().unflatten(-1, (3, self.heads, -1)).unbind(2)
        looks = torch.einsum('bhd,bnhd->bhn', q[:, 0]*q.shape[-1]**-.5, k).softmax(-1).mean(1)[:, 1:]
        return t.replace(scores=looks/looks.amax(1, keepdim=True))

class Random(nn.Module):
    def forward(self, t): return t.replace(scores=torch.rand(t.x.shape[:2]))

class Dropped(nn.Module):
    "No rest token"
    def forward(self, t, keep): return select(t, keep)

class Merged(nn.Module):
    "Each dropped token is averaged into the kept one most like it"
    def forward(self, t, keep):
        if keep is None: return t
        short, kept = select(t, keep), keep_mask(t, keep)
        to = (F.normalize(t.x, dim=-1) @ F.normalize(short.x, dim=-1).mT).argmax(-1)
        to = torch.where(kept, kept.cumsum(1) - 1, to)
        weight = (to[..., None] == torch.arange(short.x.shape[1])).to(t.x.dtype)
        return short.replace(x=weight.mT @ t.x/weight.sum(1)[..., None])

class ToMe(nn.Module):
    "Token merging (Bolya et al. 2023): r tokens of each block are averaged into others most like them"
    def __init__(self, vit): super().__init__(); self.vit = vit

    def forward(self, x, r):
        if isinstance(r, list): return torch.stack([self(x, one) for one in r])
        v = self.vit; x = v.norm_pre(v._pos_embed(v.patch_embed(x)))
        size = x.new_ones(*x.shape[:2], 1)
        for b in v.blocks:
            n, a = min(r, (x.shape[1] - 1)//2), b.attn
            q, k, val = a.qkv(b.norm1(x)).unflatten(-1, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weight = size.log().mT[:, None].to(q.dtype) if r else None
            h = F.scaled_dot_product_attention(q, k, val, attn_mask=weight)
            x = x + a.proj(h.transpose(1, 2).flatten(2))
            if n: x, size = merge_tokens(x, size, k.mean(1), n)
            x = x + b.mlp(b.norm2(x))
        return v.forward_head(v.norm(x))

def model_of(name, vit):
    rule, _, after = name.partition('-')
    if rule == 'tome': return ToMe(vit)
    m = budgeted(vit, int(after))
    if rule.startswith('attention'):
        m.scorer, m.rest.write = ClassAttention(vit, int(after)), nn.Identity()
        if rule == 'attention_dropped': m.rest = Dropped()
    elif rule == 'merge': m.rest = Merged()
    elif rule.startswith('random'):
        m.scorer = Random()
        if rule == 'random': m.rest = Dropped()
    return m

def save(name, result, preds, labels):
    (here/f'{name}.json').write_text(json.dumps(result, indent=1) + '\n')
    np.savez_compressed(here/f'{name}.npz', preds=preds.astype(np.int8), labels=labels.astype(np.int8))

@torch.no_grad()
def evaluate(model, loader, budgets):
    model.eval(); torch.manual_seed(seed); preds, labels = [], []
    for x, y in loader: preds.append(model(x, budgets).argmax(-1)); labels.append(y)
    preds, labels = torch.cat(preds, 1).numpy(), torch.cat(labels).numpy()
    return preds, labels, [round(float((p == labels).mean()), 4) for p in preds]

def main(data, what, *names):
    torch.set_num_threads(1)
    set_fused_attn(what == 'time')  # in training on a CPU the other is faster
    source = provenance('cpu'); source['versions']['timm'] = timm.__version__
    if what == 'time': return time(source)
    data = load_data(data, 64)
    def loaders(seed=seed):
        set_seed(seed, reproducible=True)
        return image_loaders(data, 64, augment='resized_crop')
    if what == 'base':
        dls = loaders(); vit = make()
        log = train(create_learner(vit, dls, .05, [BFloat16()]), 20, 1e-3, 'one_cycle', path=here/'base.ckpt')
        torch.save(vit.state_dict(), here/'base.pt')
        preds, labels, accuracy = evaluate(Whole(vit), dls.valid, [None])
        save('base', dict(name='base', recipe=recipe, accuracy=accuracy, epochs=log, **source), preds, labels)
    for name in names:
        rule, _, own = name.partition('@')
        dls = loaders(int(own or seed)); vit = make()
        vit.load_state_dict(torch.load(here/'base.pt', weights_only=True))
        m, log = model_of(rule, vit), []
        if what == 'teach':
            log = teach(m, dls, epochs=2, freeze=name.startswith('frozen'), precision='bfloat16')
        tome = name == 'tome'
        preds, labels, accuracy = evaluate(m, dls.valid, rs if tome else [k and TopK(k) for k in ks])
        file = name if log else f'{name}-untaught'
        save(file, dict(name=rule, seed=int(own or seed), taught=bool(log), budgets=rs if tome else ks,
                        accuracy=accuracy, epochs=log, **source), preds, labels)
        print(file, accuracy, flush=True)

class Whole(nn.Module):
    def __init__(self, vit): super().__init__(); self.vit = vit
    def forward(self, x, budgets): return self.vit(x)[None]

@torch.no_grad()
def time(source):
    rows = []
    for batch in (1, 32):
        x, calls = torch.randn(batch, 3, 64, 64), {}
        vit = make().eval(); calls['timm', None] = lambda: vit(x)
        for name in ('ours-0', 'ours-1', 'ours-2', 'ours-3', 'attention-1', 'attention-2', 'attention-3',
                     'random-2', 'random_rest-2', 'merge-2', 'tome'):
            m = model_of(name, make()).eval()
            for k in rs if name == 'tome' else ks:
                calls[name, k] = lambda m=m, k=k if name == 'tome' else k and TopK(k): m(x, k)
        for (name, k), ms in in_turns(calls, 21).items():
            rows.append(dict(name=name, budget=k, batch_size=batch, ms=float(np.median(ms)), rounds=ms))
    (here/'time.json').write_text(json.dumps(dict(rows=rows, threads=1, **source)) + '\n')

if __name__ == '__main__': main(*sys.argv[1:])
