"The references that the speed scripts compare with, and what they count, by hand"
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import pytest, torch
from torch import nn
from sigma_tokenizer import create_model
from sigma_tokenizer.data import digits_data
from sigma_tokenizer.svd import SVDTokenizer
from sigma_tokenizer.tokens import imagenet_normalize, sample_photos

file = Path(__file__).parents[1]/'results'/'speed'/'run.py'
spec = spec_from_file_location('speed', file)
spec.loader.exec_module(speed := module_from_spec(spec))
size = dict(image_size=64, patch_size=8, embed_dim=64, depth=2, num_heads=4)

def test_merge_tokens_by_a_loop():
    "Token by token, as the paper says it"
    g = torch.Generator().manual_seed(0)
    for N, r in ((6, 1), (9, 4), (65, 10)):
        x, keys = (torch.randn(2, N, d, generator=g) for d in (16, 8))
        sizes = torch.randint(1, 5, (2, N, 1), generator=g).float()
        got, got_sizes = speed.merge_tokens(x, sizes, keys, r)
        for b in range(2):
            cos = nn.functional.cosine_similarity(keys[b, :, None], keys[b, None], dim=-1)
            best = {i: max((cos[i, j].item(), j) for j in range(1, N, 2)) for i in range(2, N, 2)}
            gone = sorted(best, key=best.get, reverse=True)[:r]
            groups = {i: [i] for i in [*range(0, N, 2), *range(1, N, 2)] if i not in gone}
            for i in gone: groups[best[i][1]].append(i)
            for i, group in enumerate(groups.values()):
                n = sizes[b, group]
                torch.testing.assert_close(got[b, i], (x[b, group]*n).sum(0)/n.sum())
                assert got_sizes[b, i] == n.sum()

@torch.no_grad()
def test_token_merging_without_a_difference():
    "Nothing merged, or exact twins merged: the plain encoder's output"
    vit = create_model('vit', **size).eval(); t = vit.embed(imagenet_normalize(sample_photos(64)))
    torch.testing.assert_close(speed.tome_encoder(vit, t, [0, 0]), vit.encode(t), rtol=0, atol=1e-5)
    twins = t.replace(x=t.x.repeat_interleave(2, 1), mask=t.mask.repeat_interleave(2, 1))
    torch.testing.assert_close(speed.tome_encoder(vit, twins, [64, 0]), vit.encode(twins), rtol=0, atol=1e-5)

@torch.no_grad()
def test_encoders_by_hand():
    N, D, depth = 65, 64, 2
    block, last = 2*N*D*12*D + 2*2*N*N*D, 2*N*D*2*D + 2*1*D*10*D + 2*2*N*D  # the last: only the class token's output
    photos = sample_photos(64); models = speed.make_models(size, photos)
    rows = {r['encoder']: r for r in speed.time_encoders(models, photos, 1)}
    assert rows['timm']['gflop'] == round(depth*block/1e9, 5)
    assert rows['ours']['gflop'] == round(((depth - 1)*block + last)/1e9, 5)
    assert rows['token merging, r=4']['tokens'] == 65 - 2*4
    logits = models['msvd_gated'].embed(imagenet_normalize(photos)).scores.logit()
    assert abs(logits.std() - 2) < .01 and abs(logits.mean()) < .01

@pytest.mark.parametrize('criterion, p', [('squared', .9), ('linear', .8)])
def test_svd_tokens_by_a_loop(criterion, p):
    "The same tokens and ranks, up to the vectors' signs"
    class Size(nn.Module):  # what no sign can change
        def forward(self, pairs): return pairs.abs()
    x, svd = imagenet_normalize(sample_photos(128)), SVDTokenizer(128, 2*3*128, p, criterion, read='linear'); svd.proj = Size()
    plain, ranks = speed.plain_svd_tokens(svd, x); ours = svd(x)
    assert ranks == ours.lengths.tolist() and (plain - ours.x).norm() < 1e-3*plain.norm()

def test_ranks():
    assert [r['differ'] for r in speed.check_ranks(digits_data(32).test.images, 'cpu')] == [0]*4

def test_a_run(tmp_path):
    speed.main('quick', batches='2', repeats=1, methods='fft', out=str(tmp_path))
    assert '"fft s=8"' in (tmp_path/'quick-cpu-float32-fft.json').read_text()
