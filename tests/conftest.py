"Small models, odd images, and hypothesis' settings, for all tests"
from functools import lru_cache
import pytest, torch
from hypothesis import HealthCheck, settings, strategies as st
from torch import nn
from sigma_tokenizer import TopK, TopP, create_model, list_models
from sigma_tokenizer.fft import FFTTokenizer
from sigma_tokenizer.reduce import GridPool, RestToken
from sigma_tokenizer.score import Scorer
from sigma_tokenizer.svd import SVDTokenizer
from sigma_tokenizer.tokens import sample_photos
from sigma_tokenizer.vit import VisionTransformer

torch.set_num_threads(1)  # pytest-xdist runs a process for each core
settings.register_profile('same every time', max_examples=15, deadline=None, derandomize=True,
                          database=None, suppress_health_check=list(HealthCheck))
settings.load_profile('same every time')

def slow(*values):
    "The same values for `pytest.mark.parametrize`, marked as slow"
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]

small = dict(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
variants = [*((name, {}) for name in list_models()), ('msvd_gated', dict(reduction='rest')),
            ('glimpse', dict(reduction='cells', shrink=2)),
            ('msvd', dict(reduction='pool')), ('vit_conv', dict(reduction='pool')), ('vit_conv_gated', dict(depth=0)),
            ('fft', dict(energy=.9)), ('fft', dict(filter_size=8, band='high')),
            ('fft', dict(cut='patches', energy=.95)), ('fft', dict(cut='radial_bins', filter_size=16)),
            ('svd', dict(energy=.99, criterion='linear', read='linear')), ('svd', dict(energy=1., rank=5, reduction='rest')),
            # padded tokens with scores, which `create_model` does not make
            *((name, dict(reduction=r)) for name in ('scored fft', 'scored svd')
              for r in (None, 'rest'))]
def label(variant): return ' '.join([variant[0], *map(str, variant[1].values())])

def make(name, **kw):
    if name in list_models(): return create_model(name, **small | kw)
    tokenizer = FFTTokenizer(32, 8, 32, energy=.9) if name == 'scored fft' else SVDTokenizer(32, 32, .95)
    return VisionTransformer(tokenizer, depth=2, num_heads=4, scorer=Scorer(32), reduction=RestToken(32) if kw['reduction'] else None)

def some_budgets(m):
    "Budgets that a model takes"
    if m.scorer is not None or getattr(m.tokenizer, 'scored', False): return None, TopK(3), TopP(.3)
    return (None, TopK(4)) if isinstance(m.reduction, GridPool) else (None,)

@lru_cache(None)
def model(i, dtype=torch.float32):
    "A model of `variants` with statistics as after training, unequal scores, and tokens as strong as the positions"
    torch.manual_seed(i); m = make(variants[i][0], **variants[i][1]); tok = m.tokenizer
    with torch.no_grad():
        for part in m.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.running_mean.normal_(0, .1); part.running_var.uniform_(.2, 2.)
                part.weight.uniform_(.5, 1.5); part.bias.normal_(0, .1)
        if m.scorer is not None: m.scorer.mlp[-1].weight.mul_(8)
        last = tok.look[-1] if hasattr(tok, 'look') else tok.proj
        last.weight.div_(tok.eval()(batch([('crop', 0), ('crop', 1), ('noise', 0)])).x.std((0, 1)).mean())
    return m.eval().requires_grad_(False).to(dtype)

photos = sample_photos()
def image(kind, seed, side=32):
    "A (3, side, side) image"
    g = torch.Generator().manual_seed(seed); x = torch.rand(3, side, side, generator=g)
    i, j = torch.randint(0, 256 - side, (2,), generator=g).tolist()
    crop = photos[seed % 2, :, i:i+side, j:j+side]
    return dict(crop=crop, noise=x, bright=1e4*crop, dim=1e-4*crop, repeats=crop[:, :side//4, :side//4].repeat(1, 4, 4),
                mirrored=crop + crop.flip(-1), low=x[:, :, :2] @ x[:, :2], pixel=(x == x.amax()).float(),
                flat=x[:, :1, :1].expand_as(x), black=torch.zeros_like(x))[kind]

kinds = 'crop noise bright dim repeats mirrored low pixel flat black'.split()
images = st.tuples(st.sampled_from(kinds), st.integers(0, 9))
def batch(drawn): return torch.stack([image(*d) for d in drawn])
def gap(a, b): return ((a - b).norm(dim=-1)/b.norm(dim=-1)).max().item()
