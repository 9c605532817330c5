"""How fast every method is, beside other encoders and a loop over images.  nbs/32_speed.ipynb shows what came out.

    python run.py PRESET --data DIR [--precision bfloat16] [--batches 1,8] [--repeats 3]
    python run.py PRESET --data DIR --methods msvd_gated --out ../speed_short    only methods whose name begins so

PRESET is one of sigma_reproduce's, and says the size. DIR holds seg_train/ and seg_test/; without it the images are two
photographs, and ranks and loader are left out. It writes OUT/PRESET-DEVICE-PRECISION[-METHODS].json; OUT is this folder
unless you say. Run it on a machine that does nothing else, and let the C library keep freed memory:

    export OMP_NUM_THREADS=2 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_MMAP_THRESHOLD_=8589934592

    file                                  options                           commit
    small-cpu-{float32,bfloat16}.json                                       5e7bcc1
    paper-cpu-float32.json                --batches 1,8 --repeats 3         5e7bcc1
    paper-cpu-bfloat16.json               --batches 1,8 --repeats 3         339c9d4
    ../speed_short/small-*.json           --batches 64                      0b8cf0b
    ../speed_short/paper-*.json           --batches 8 --repeats 3           0b8cf0b

`sigma_bench` of these commits wrote the files; it also measured training and two more encoders (separate heads, matrix
products alone), and said mass for top-p and padded for masked. A row of `methods`:

    tokens, shortest, longest             length of the sequence, class token included: mean, least, most
    tokenizer_ms, encoder_ms, whole_ms    images to tokens; selection, blocks and head; all: medians of the rounds
    gflop, tokenizer_gflop, peak_mib      10^9 operations for one image; memory that the whole model holds at once
"""
import json, platform, re, sys
from importlib import metadata
from pathlib import Path
from statistics import median
import numpy as np, pandas as pd, torch
from fastcore.script import call_parse
from timm.models import VisionTransformer as TimmViT
from torch import nn
from torch.nn import functional as F
from sigma_tokenizer.bench import gflop, peak_memory
from sigma_tokenizer.data import atomic_write, image_loaders
from sigma_tokenizer.evaluation import in_turns
from sigma_tokenizer.models import create_model
from sigma_tokenizer.repro.experiments import load_preset
from sigma_tokenizer.repro.folders import load_data
from sigma_tokenizer.repro.runs import provenance
from sigma_tokenizer.select import TopK, TopP, keep_mask
from sigma_tokenizer.svd import SVDTokenizer, energy_rank, kept_triplets
from sigma_tokenizer.tokens import imagenet_normalize, sample_photos
from sigma_tokenizer.training import autocast

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
from token_merging import merge_tokens

shares = [('squared', .9), ('squared', .95), ('squared', .99), ('linear', .9)]

def machine(device):
    "What the times were measured on"
    name, info = platform.machine(), Path('/proc/cpuinfo')
    if info.exists() and (found := re.search('model name.*: (.*)', info.read_text())): name = found[1]
    if torch.device(device).type == 'cuda': name = torch.cuda.get_device_name(device)
    made = provenance(device)
    return made | dict(threads=torch.get_num_threads(), processor=name,
                       versions=made['versions'] | dict(timm=metadata.version('timm')))

def photos(n, side, data):
    "Always the same (n, 3, side, side) in [0, 1]: of the test split, or two sample photographs in turn"
    if not data: return sample_photos(side)[torch.arange(n) % 2]
    some = data.test.images[np.random.default_rng(0).permutation(len(data.test))[:n]]
    return torch.from_numpy(some).permute(0, 3, 1, 2).contiguous().float()/255

def make_models(size, images, only=''):
    "Untrained models by name, with scores whose logits have mean 0 and deviation 2, so that top-p keeps a part"
    side = size['image_size']
    methods = {**{name: {} for name in ('vit', 'vit_conv', 'msvd', 'msvd_gated')},
               **{f'fft s={s}': dict(filter_size=s) for s in (side//4, side//2, side)},
               'fft p=0.95': dict(energy=.95),
               **{f'svd p={p:.2f} {c}': dict(energy=p, criterion=c, read='linear') for c, p in shares},
               **{f'svd conv p={p:.2f} {c}': dict(energy=p, criterion=c) for c, p in shares if c == 'squared'},
               **{f'{m}_gated, rest token': dict(reduction='rest') for m in ('msvd', 'vit_conv')}}
    models = {name: create_model(re.match(r'\w+', name)[0], **size, **kw).eval().to(images.device)
              for name, kw in methods.items() if name.startswith(only)}
    for m in (m for m in models.values() if m.scorer):
        last, logits = m.scorer.mlp[-1], m.embed(imagenet_normalize(images)).scores.double().logit()
        last.weight *= 2/logits.std(); last.bias.sub_(logits.mean()).mul_(2/logits.std())
    return models

def budgets(model, t):
    "What is kept -> budget"
    if t.scores is None: return {'all': None}
    n, mean = model.n_tokens, round(keep_mask(t, TopP(.5)).sum().item()/len(t.x))
    ks = sorted({max(1, k*n//256) for k in (1, 4, 16, 32, 64, 128, 192)}, reverse=True)
    return {'all': None, **{f'k={k}': TopK(k) for k in ks}, 'top-p 0.5': TopP(.5),
            f'k={mean}, as top-p 0.5': TopK(mean)}

def time_methods(models, images, repeats):
    rows, calls, B = [], {}, len(images)
    for name, m in models.items():
        x = imagenet_normalize(images) if m.normalize else images
        for kept, keep in budgets(m, t := m.embed(x)).items():
            i, n = len(rows), m.reduce(t, keep).lengths + 1
            whole = calls[i, 'whole'] = lambda m=m, x=x, k=keep: m(x, k)
            tokenizer = calls[i, 'tokenizer'] = lambda m=m, x=x: m.embed(x)
            calls[i, 'encoder'] = lambda m=m, t=t, k=keep: m.head(m.encode(m.reduce(t, k)))
            rows.append(dict(method=name, kept=kept, batch_size=B, tokens=round(int(n.sum())/B, 2),
                             shortest=int(n.min()), longest=int(n.max()),
                             gflop=gflop(whole, B), tokenizer_gflop=gflop(tokenizer, B),
                             peak_mib=round(peak_memory(whole, x.device)/2**20, 2)))
    ms = in_turns(calls, repeats)
    for i, r in enumerate(rows):
        r |= {f'{part}_ms': median(ms[i, part]) for part in ('tokenizer', 'encoder', 'whole')}
        r |= dict(whole_rounds_ms=ms[i, 'whole'], images_per_s=round(1e3*B/r['whole_ms'], 2))
    return rows

def tome_encoder(model, t, r):
    "The class token's output for tokens t (B, N, D), with r[i] tokens merged away between attention and MLP of block i"
    x, _ = model.sequence(t)
    size = x.new_ones(*x.shape[:2], 1)
    for b, n in zip(model.blocks, r):
        h = b.norm1(x)
        q, k, v = (y.unflatten(-1, (b.attn.num_heads, -1)).transpose(1, 2)
                   for y in (b.attn.q(h), *b.attn.kv(h).chunk(2, -1)))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log().mT[:, None].to(q.dtype))
        x = x + b.attn.proj(h.transpose(1, 2).flatten(2))
        x, size = merge_tokens(x, size, k.mean(1), n)
        x = x + b.mlp(b.norm2(x))
    return model.norm(x)[:, 0]

def time_encoders(models, images, repeats):
    "From tokens to what the head reads; a row's tokens are those of the last block"
    vit, gated, x = models['vit'], models['msvd_gated'], imagenet_normalize(images)
    t, g, depth = vit.embed(x), gated.embed(x), len(vit.blocks)
    n = t.x.shape[1]; quarter = TopK(n//4)
    size = {k: vit.config[k] for k in ('patch_size', 'embed_dim', 'depth', 'num_heads')}
    timm, tokens = TimmViT(x.shape[-1], **size).eval().to(x.device), vit.sequence(t)[0]
    calls = {'ours': (n, lambda: vit.encode(t)),
             f'ours, k={quarter.k}': (quarter.k, lambda: gated.encode(gated.reduce(g, quarter))),
             'timm': (n, lambda: timm.norm(timm.blocks(tokens))[:, 0])}
    for r in (n//32, n//16):
        calls[f'token merging, r={r}'] = n - r*depth, lambda r=[r]*depth: tome_encoder(vit, t, r)
    ms = in_turns({name: call for name, (_, call) in calls.items()}, repeats)
    return [dict(encoder=name, batch_size=len(x), tokens=n + 1, ms=median(ms[name]), rounds_ms=ms[name],
                 gflop=gflop(call, len(x))) for name, (n, call) in calls.items()]

def plain_svd_tokens(tokenizer, x):
    "Tokens and ranks by a loop over images; a triplet's vectors may differ in sign from the tokenizer's"
    sequences = []
    for image in x:
        U, S, Vh = torch.linalg.svd(image)
        held = (S**(2 if tokenizer.criterion == 'squared' else 1)).sum(0).cumsum(0)
        k = int((held < tokenizer.energy*held[-1]).sum()) + 1
        root = S[:, None, :k].sqrt()
        sequences.append(tokenizer.vectors(*((h[..., :k]*root).movedim(-1, 0) for h in (U, Vh.mT))))
    return nn.utils.rnn.pad_sequence(sequences, batch_first=True), [len(s) for s in sequences]

def time_svd(images, embed_dim, repeats):
    x, calls = imagenet_normalize(images), {}
    for c, p in shares:
        tokenizer = SVDTokenizer(x.shape[-1], embed_dim, p, c, read='linear').to(x.device)
        calls[c, p, 'ours'] = lambda t=tokenizer: t(x)
        calls[c, p, 'loop'] = lambda t=tokenizer: plain_svd_tokens(t, x)
    ms = in_turns(calls, repeats)
    return [dict(criterion=c, p=p, batch_size=len(x), ours_ms=median(ms[c, p, 'ours']),
                 loop_ms=median(ms[c, p, 'loop'])) for c, p in shares]

def check_ranks(images, device):
    "Ranks of (n, S, S, 3) uint8 images: how many differ from those of a decomposition in float64"
    found = {share: [] for share in shares}
    for part in np.array_split(images, max(1, len(images)//50)):
        x = imagenet_normalize(torch.from_numpy(part).to(device).permute(0, 3, 1, 2).float()/255)
        S = torch.linalg.svdvals(x.double().cpu())
        for (c, p), ks in found.items():
            ks.append(torch.stack([kept_triplets(x, p, c)[3].cpu(), energy_rank(S, p, c)]))
    found = {share: torch.cat(ks, 1) for share, ks in found.items()}
    return [dict(criterion=c, p=p, images=len(images), differ=int((ours != want).sum()),
                 mean_rank=round(int(ours.sum())/len(images), 2)) for (c, p), (ours, want) in found.items()]

def time_loader(data, bs, device):
    "Training images a second; a round is an epoch"
    loader = image_loaders(data, bs, device=device).train
    epoch = lambda: sum(len(x) for x, _ in loader)
    rate = 1e3*epoch()/median(in_turns({'': epoch}, 3)[''])
    return dict(image_size=loader.image_size, batch_size=bs, ours=round(rate, 1))

@call_parse
@torch.no_grad()
def main(
    preset:str,  # whose size to measure
    data:str=None,  # 'intel', 'digits' or a folder
    device:str='cpu',
    precision:str='float32',  # 'float32' or 'bfloat16'
    batches:str='1,8,64',  # sizes of the batches
    repeats:int=5,  # rounds
    methods:str='',  # only the part on methods, and only those whose name begins so
    out:str=str(here)  # folder
):
    "Time every method of a preset's size"
    settings, batches = load_preset(preset), [int(b) for b in batches.split(',')]
    size = {k: v for k, v in settings['model'].items() if not isinstance(v, dict)}
    decoded = data and load_data(data, size['image_size'])
    images = photos(max(32, *batches), size['image_size'], decoded).to(device)
    torch.manual_seed(0); models = make_models(size, images[:8], methods)
    result = dict(preset=preset, precision=precision, model=size, repeats=repeats,
                  images=data and Path(data).name or 'sample photographs', **machine(device))
    def add(part, rows): result[part] = rows; print(pd.DataFrame(rows).to_string())
    with autocast(device, precision):  # one for all, so that weights are cast once
        add('methods', [r for b in batches for r in time_methods(models, images[:b], repeats)])
        if not methods: add('encoders', [r for b in batches for r in time_encoders(models, images[:b], repeats)])
    if not methods: add('svd', time_svd(images[:32], size['embed_dim'], repeats))
    if data and not methods:
        add('ranks', check_ranks(decoded.test.images, device))
        add('data', [time_loader(decoded, settings['train']['batch_size'], device)])
    name = '-'.join([Path(preset).stem, torch.device(device).type, precision, *methods.split()])
    with atomic_write(Path(out)/f'{name}.json') as new: new.write_text(json.dumps(result, indent=1) + '\n')
