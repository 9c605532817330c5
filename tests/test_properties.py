"Properties that hold for any image, batch and budget"
import copy, math
from contextlib import contextmanager
from fractions import Fraction
import numpy as np, pytest, torch
import torch.nn.functional as F
from hypothesis import assume, given, settings, strategies as st
from sigma_tokenizer import TopK, TopP
from sigma_tokenizer.fft import FFTTokenizer, energy_side, log_spectrum
from sigma_tokenizer.reduce import GridPool, RestToken
from sigma_tokenizer.select import select
from sigma_tokenizer.svd import (SVDTokenizer, _orthonormal, energy_rank, kept_triplets, leading_triplets,
                                 singular_triplets, start_basis, sure_rank)
from sigma_tokenizer.data import digits_data
from sigma_tokenizer.tokens import Tokens, imagenet_normalize, sample_photos, scatter_tokens, sinusoidal
from conftest import batch, gap, images, label, make, model, photos, some_budgets, variants

some_models = pytest.mark.parametrize('i', range(len(variants)), ids=map(label, variants))
batches = st.lists(images, min_size=2, max_size=4).map(batch)
p_budgets = st.builds(TopP, st.floats(0, 1, exclude_min=True) | st.sampled_from([.25, .5, .75, 1]))
def budgets(m):
    "The budgets that a model takes"
    if isinstance(m.reduction, GridPool): return st.none() | st.builds(TopK, st.integers(1, 40))
    if m.scorer is None: return st.none()
    return st.none() | p_budgets | st.builds(TopK, st.integers(not isinstance(m.reduction, RestToken), 40))

# a batch changes nothing

@some_models
@given(st.data())
def test_an_image_alone_and_in_a_batch(i, data):
    dtype, at_most = data.draw(st.sampled_from([(torch.float32, 1e-5), (torch.float64, 1e-11)]))
    m = model(i, dtype); x, keep = data.draw(batches).to(dtype), data.draw(budgets(m))
    together = m(x, keep=keep)
    assert together.isfinite().all()
    assert gap(together, torch.cat([m(im[None], keep=keep) for im in x])) < at_most

@some_models
@settings(max_examples=5)
@given(st.data())
def test_memory_layout_and_float64(i, data):
    m = model(i); x, keep = data.draw(batches), data.draw(budgets(m)); want = m(x, keep=keep)
    part = F.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2]
    for other in (x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT, part):
        assert gap(m(other, keep=keep), want) < 1e-3
    t, double = m.embed(x), model(i, torch.float64).embed(x.double())
    assert t.scores is None or not t.scores[~t.mask].any()
    assert t.x.dtype == torch.float32 and double.x.dtype == torch.float64
    assert torch.equal(t.mask, double.mask) and torch.equal(t.position, double.position)
    assert gap(t.x[t.mask].double(), double.x[t.mask]) < 1e-2

@some_models
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_one_image_that_is_not_finite(i, value):
    m, x = model(i), batch([('crop', 0), ('crop', 1), ('noise', 0)]); bad = x.clone(); bad[1, 0, 3, 5] = value
    for keep in some_budgets(m):
        got, want = m(bad, keep=keep), m(x, keep=keep)
        assert got[1].isnan().all() and gap(got[[0, 2]], want[[0, 2]]) < 2e-6

@contextmanager
def default_dtype(dtype):
    "As those who load large models set it"
    torch.set_default_dtype(dtype)
    try: yield
    finally: torch.set_default_dtype(torch.float32)

@some_models
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_torchs_default_dtype(i, dtype):
    m, x = model(i), batch([('crop', 0), ('crop', 1), ('noise', 0)]); plain = [m(x, keep=k) for k in some_budgets(m)]
    with default_dtype(dtype):
        assert all(torch.equal(m(x, keep=k), want) for k, want in zip(some_budgets(m), plain))
        made = make(variants[i][0], **variants[i][1]).eval().requires_grad_(False)
        assert made.pos_embed.dtype == dtype
        if 'pos_embed' not in made.state_dict(): assert torch.equal(made.pos_embed, m.pos_embed.to(dtype))
        made.load_state_dict(m.state_dict())
        torch.testing.assert_close(made(x.to(dtype)), copy.deepcopy(m).to(dtype)(x.to(dtype)))

def test_torchs_default_dtype_and_data():
    def made():
        digits = torch.from_numpy(digits_data(20).train.images)
        return digits, sample_photos(99), imagenet_normalize(sample_photos(64))
    want = made()
    for dtype in (torch.bfloat16, torch.float64):
        with default_dtype(dtype): assert all(map(torch.equal, made(), want))

# selection

score = st.sampled_from([0., 1e-9, .125, .25, .5, .5 + 2**-17, .5 + 1e-7, .9, 1.]) | st.floats(0, 1, width=32)
def as_tokens(rows):
    scores, mask = torch.tensor([[s for s, _ in r] for r in rows]), torch.tensor([[m for _, m in r] for r in rows])
    g = torch.Generator().manual_seed(n := mask.shape[1])
    position = torch.randperm(50, generator=g)[:n].sort()[0].expand_as(mask)
    return Tokens(torch.randn(*mask.shape, 4, generator=g), mask, scores*mask, position, not bool(mask.all()))
def rows(n):
    row = st.lists(st.tuples(score, st.booleans()), min_size=n, max_size=n).filter(lambda r: any(m for _, m in r))
    return st.lists(row, min_size=1, max_size=3)
scored_tokens = st.integers(1, 9).flatmap(rows).map(as_tokens)
any_budget = p_budgets | st.builds(TopK, st.integers(1, 12) | st.just(2**64))

def plain_kept(scores, real, keep):
    "Where the tokens that a budget keeps of one image are: by score in steps of 2^-16, the first among equals"
    steps = {i: max(1, round(float(s)*2**16)) for i, (s, r) in enumerate(zip(scores, real)) if r}
    order = sorted(steps, key=lambda i: (-steps[i], i))
    if isinstance(keep, TopK): return sorted(order[:keep.k])
    enough = (n for n in range(1, 99) if sum(steps[i] for i in order[:n]) >= keep.p*sum(steps.values()))
    return sorted(order[:next(enough)])

@settings(max_examples=150)
@given(scored_tokens, any_budget)
def test_kept_tokens_are_the_plain_rules(t, keep):
    short = select(t, keep)
    assert short.padded == (not bool(short.mask.all()))
    back = scatter_tokens(short, 50)
    for i in range(len(t.x)):
        kept = plain_kept(t.scores[i], t.mask[i], keep); n = len(kept)
        assert short.mask[i].tolist() == [True]*n + [False]*(short.mask.shape[1] - n)
        for f in ('x', 'scores', 'position'): assert torch.equal(getattr(short, f)[i, :n], getattr(t, f)[i, kept])
        assert not short.scores[i, n:].any()
        at = t.position[i, kept]  # back at its position, and nothing beside
        assert back.mask[i].nonzero()[:, 0].tolist() == at.tolist()
        assert torch.equal(back.x[i, at], t.x[i, kept]) and torch.equal(back.scores[i, at], t.scores[i, kept])
        assert not back.x[i, ~back.mask[i]].any()

@settings(max_examples=25)
@given(scored_tokens, st.integers(1, 11), st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True))
def test_a_smaller_budget_keeps_a_subset(t, k, p, q):
    for less, more in [(TopK(k), TopK(k + 1)), (TopP(min(p, q)), TopP(max(p, q)))]:
        assert (less(t.scores, t.mask) <= more(t.scores, t.mask)).all()
    twice, once = select(select(t, TopK(k + 1)), TopK(k)), select(t, TopK(k))
    assert torch.equal(twice.mask, once.mask) and torch.equal(twice.x[twice.mask], once.x[once.mask])

@settings(max_examples=25)
@given(st.integers(1, 12), st.integers(2, 40), st.integers(0, 99), st.floats(0, 1))
def test_from_mean(B, N, seed, at):
    g = torch.Generator().manual_seed(seed)
    scores, real = torch.rand(B, N, generator=g)**2, torch.rand(B, N, generator=g) < .8
    real[:, 0] = True; mean = 1 + at*(real.sum(1).double().mean().item() - 1)
    got = TopP.from_mean(scores*real, real, mean)(scores*real, real).sum(1).double().mean().item()
    assert abs(got - mean) <= .5/B + 1e-9

@settings(max_examples=100)
@given(scored_tokens, any_budget)
def test_rest_one_image_at_a_time(t, keep):
    torch.manual_seed(0); rest = RestToken(4).requires_grad_(False)
    t = t.replace(x=torch.where(t.mask[..., None], t.x, 1e6))  # padding is not to be read
    summed = rest(t, keep)
    for i, real in enumerate(t.mask):
        x, s, position = t.x[i, real], t.scores[i, real], t.position[i, real]
        kept = plain_kept(s, real[real], keep); lost = [j for j in range(len(x)) if j not in kept]
        want = [x[kept]]
        if lost: want.insert(0, rest.write((s[lost, None]*x[lost]).sum(0)/max(s[lost].sum(), 1e-12))[None])
        torch.testing.assert_close(summed.x[i][summed.mask[i]], torch.cat(want), rtol=1e-4, atol=1e-5)
        assert summed.position[i][summed.mask[i]].tolist() == [-1]*bool(lost) + position[kept].tolist()

# energy: FFT and SVD

def first_reaching(held, p):
    "Where a rising list of shares reaches p; examples too close to tell are left out"
    assume(all(abs(h - p) > 1e-5 for h in held)); return next(n for n, h in enumerate(held) if h >= p)
share = st.floats(1e-7, .9999) | st.sampled_from([1e-9, .5, .9, .95, .99, .999])
some_images = st.lists(images, min_size=1, max_size=3).map(batch)

@settings(max_examples=60)
@given(some_images, st.sampled_from([4, 8, 16]), share)
def test_fft_side_is_the_smallest(x, step, p):
    f = np.fft.fftshift(np.fft.fft2(x.double().numpy(), norm='ortho'), axes=(2, 3))
    f = np.concatenate([f.real, f.imag], 1); f = np.sign(f)*np.log(1 + np.abs(f))
    assert (log_spectrum(x) - torch.tensor(f)).abs().max() <= 1e-4*max(1, x.max())
    far = np.abs(np.arange(32) - 15.5); far = np.maximum(far[:, None], far); energy = (f**2).sum(1)
    def side(e): return step*(1 + first_reaching([e[far < s/2].sum()/e.sum() for s in range(step, 33, step)], p))
    sides = [side(e) if e.any() else step for e in energy]
    assert energy_side(torch.tensor(f), p, step).tolist() == sides
    t = FFTTokenizer(32, step, 8, energy=p)(x)
    for i, s in enumerate(sides):
        first = (32//step - s//step)//2; cells = range(first, first + s//step)
        assert t.position[i][t.mask[i]].tolist() == [r*32//step + c for r in cells for c in cells]

@settings(max_examples=60)
@given(some_images, share, st.sampled_from(['squared', 'linear']))
def test_svd_ranks_are_those_of_float64(x, p, criterion):
    sigma = np.linalg.svd(x.double().numpy(), compute_uv=False)
    held = (sigma**(2 if criterion == 'squared' else 1)).sum(1).cumsum(1)
    want = [1 + first_reaching(h/h[-1], p) if h[-1] else 1 for h in held]
    assert energy_rank(torch.from_numpy(sigma), p, criterion).tolist() == want
    assert SVDTokenizer(32, 8, p, criterion)(x).lengths.tolist() == want
    U, S, V, k = kept_triplets(x, p, criterion); assert k.tolist() == want
    for i, n in enumerate(want):
        np.testing.assert_allclose(S[i, :, :n], sigma[i, :, :n], atol=2e-4*max(sigma[i].max(), 1e-30))
        assert not S[i, :, n:].any()
        left = (U[i]*S[i, :, None] @ V[i].mT - x[i]).double().square().sum()
        assert criterion == 'linear' or left <= (1 - p + 1e-5)*x[i].double().square().sum()

@pytest.fixture(scope='module')
def odd():
    "Matrices on which a power iteration may go wrong"
    torch.manual_seed(0); i, (flower, temple) = torch.arange(256), photos
    starts = torch.cat([start_basis(256, 32), start_basis(256, 64), torch.randn(256, 1)], 1)
    unseen = torch.linalg.qr(starts.double())[0][:, -1].float()
    strength = torch.linalg.matrix_norm(temple[0], 2)*F.normalize(torch.randn(256, 1), dim=0)*unseen
    grey = [torch.randn(256, 256), (3.1*i).cos() + .5*(2.9*i[:, None]).sin(), ((i + i[:, None]) % 2)*2. - 1,
            torch.eye(256), torch.ones(256, 256), torch.randn(256, 5) @ torch.randn(5, 256),
            1e4*flower[0], 1e-6*flower[0],
            torch.linalg.qr(torch.randn(256, 256))[0]*.5**i, torch.diag((i > 200).float()) + flower[0],
            *(temple + a*strength for a in (1., .3, .1))]
    gratings = [temple + (f*.0123*i).sin()*(f*.007*(255 - i[:, None])).cos()*(i > f) for f in range(20, 256, 40)]
    return torch.stack([*(g.expand(3, -1, -1) for g in grey), *gratings, *photos, torch.zeros(3, 256, 256),
                        torch.stack([flower[0], *torch.zeros(2, 256, 256)])])

def test_ranks_of_odd_matrices(odd):
    shares = F.pad(torch.linalg.svdvals(odd.double()).square().sum(1).cumsum(1), (1, 0))
    shares = shares/shares[:, -1:].clamp(min=1e-300)
    close = [shares[-4, n].item() + d for n in (4, 9) for d in (-1e-5, 1e-5)]  # to a share of the flower
    for x, held, ps in ((photos, shares[-4:-2], close), (odd, shares, (.5, .9, .95, .99))):
        black = held[:, -1] == 0
        for p in ps:
            u, s, v, k = kept_triplets(x, p)
            assert (black | (held.gather(1, k[:, None])[:, 0] >= p - 1e-9)).all()
            assert (held.gather(1, k[:, None] - 1) < p + 1e-9).all() and (k[black] == 1).all()
    assert ((u*s[..., None, :] @ v.mT - odd).square().sum((1, 2, 3)) <= (.01 + 1e-5)*odd.square().sum((1, 2, 3))).all()
    assert torch.equal(torch.cat([kept_triplets(x[None], .99)[3] for x in odd[::3]]), k[::3])
    double = kept_triplets(photos.double(), .99)
    assert double[1].dtype == torch.float64 and torch.equal(double[3], kept_triplets(photos, .99)[3])
    assert torch.equal(kept_triplets(photos, Fraction(9, 10))[3], kept_triplets(photos, .9)[3])
    assert (kept_triplets(torch.rand(4, 3, 7, 7), .9)[3] >= 1).all()  # too small for a block of an eighth

def test_a_rank_is_certain_only_if_it_is():
    _, s, _, residual, _ = leading_triplets(photos, start_basis(256, 32), 6)
    total = photos.square().sum((1, 2, 3)).double()
    k, sure = sure_rank(s, residual, total, .9)
    assert sure.all() and torch.equal(k, energy_rank(singular_triplets(photos)[1], .9))
    at = (s.double().square().sum(1).cumsum(1)/total[:, None])[0, 3].item()
    for args in [(s, residual, total, .9999), (s, residual + 2e-4*total[0].sqrt(), total, .9),
                 (s, residual, total, at + 4e-6), (s, residual, total, at - 4e-6)]:
        assert not sure_rank(*args)[1][0]  # too few triplets, not converged, too close above and below
    nan = _orthonormal(torch.full((1, 8, 2), math.nan), torch.eye(8)[None, :, :2])
    assert torch.equal(nan, torch.eye(8)[None, :, :2])  # a step that fails is left out

@given(st.integers(1, 300), st.integers(1, 16))
def test_sinusoidal(n, half):
    got = sinusoidal(n, 2*half)
    for pos in {0, n//2, n - 1}:
        want = [f(pos/10000**(2*i/(2*half))) for i in range(half) for f in (math.sin, math.cos)]
        torch.testing.assert_close(got[pos], torch.tensor(want), rtol=0, atol=5e-5)
    assert torch.equal(sinusoidal(n + 5, 2*half)[:n], got)
