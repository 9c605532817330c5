"""Break each tokenizer in plausible ways, and say which test catches it.

    python .ci/mutate.py                    all mutants; about 9 minutes on two cores
    python .ci/mutate.py --only svd         those with `svd` in their tokenizer or name
    python .ci/mutate.py --also             and where 19_properties, which draws its examples, catches each by itself; twice the time

A mutant is a change of one line or two in an exported cell: an attention mask that is dropped, a shift over all axes, positions added twice. Each is made in a copy of the
repository, exported, and met by the tests in this order: its own notebook, 19_properties, 10_models (the slowest, only if it is still alive). The first cell that fails
has caught it. First of all the copy without a change has to pass. Exit 1 if a mutant survives. What caught which goes to results/robustness/mutants.json.
"""
import argparse, json, os, shutil, signal, sys, tempfile, time, traceback, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1'); os.environ['IN_TEST'] = '1'
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

root = Path(__file__).resolve().parent.parent
hunt, last = '19_properties', '10_models'

mutants = {  # tokenizer: [(name, notebook, old source text, new source text, what is broken)]
'patches': [
    ('grid transposed', '04_vit', 'full_tokens(self.proj(x).flatten(2).mT)', 'full_tokens(self.proj(x).mT.flatten(2).mT)', 'tokens column by column, positions row by row'),
    ('reshape for transpose', '04_vit', 'full_tokens(self.proj(x).flatten(2).mT)', 'full_tokens(self.proj(x).reshape(len(x), -1, self.embed_dim))', 'a token is made of many patches'),
    ('batch mean taken off', '04_vit', 'full_tokens(self.proj(x)', 'full_tokens(self.proj(x - x.mean())', 'images are normalised by their batch'),
    ('size not checked', '04_vit', 'check_images(x, self.proj.weight, size=self.image_size)', 'check_images(x, self.proj.weight)', 'smaller images and uneven patches are let in'),
],
'convolutional control': [
    ('BatchNorm left out', '03_stem', 'padding=1), nn.BatchNorm2d(c), nn.LeakyReLU()', 'padding=1), nn.Identity(), nn.LeakyReLU()', 'no normalisation between convolution and activation'),
    ('strided slice for unshuffle', '03_stem', 'nn.LeakyReLU(), nn.PixelUnshuffle(2))', 'nn.LeakyReLU(), nn.Sequential(nn.AvgPool2d(1, 2), nn.Upsample(scale_factor=2), nn.PixelUnshuffle(2)))', 'three of four pixels are lost'),
    ('batch statistics in evaluation', '03_stem', 'nn.BatchNorm2d(c), nn.LeakyReLU()', 'nn.BatchNorm2d(c, track_running_stats=False), nn.LeakyReLU()', 'an image depends on its batch'),
    ('each side normalised by itself', '03_stem', 'if len(xs) == 1: return [norm(xs[0])]', 'return [norm(x) for x in xs]', 'BatchNorm sees the groups of a batch one after another'),
    ('activation left out', '03_stem', 'nn.BatchNorm2d(c), nn.LeakyReLU(), nn', 'nn.BatchNorm2d(c), nn.Identity(), nn', 'the stem is linear'),
    ('grid transposed', '03_stem', 'self.proj(self.stem(x).flatten(2).mT)', 'self.proj(self.stem(x).mT.flatten(2).mT)', 'tokens column by column'),
    ('last convolution with a bias', '03_stem', 'self.out_chans, 1, bias=False)', 'self.out_chans, 1)', 'the 1x1 convolution is to have none'),
],
'FFT': [
    ('shift over all axes', '05_fft', 'torch.fft.fftshift(f, dim=(-2, -1))', 'torch.fft.fftshift(f)', 'the batch and the channels are rolled too'),
    ('real part only', '05_fft', 'torch.cat([f.real, f.imag], 1)', 'torch.cat([f.real, f.real], 1)', 'the phase is lost'),
    ('sign lost', '05_fft', 'f.sign()*f.abs().log1p()', 'f.abs().log1p()', 'the logarithm is that of magnitudes'),
    ('not orthonormal', '05_fft', "torch.float32)), norm='ortho')", 'torch.float32)))', 'the spectrum grows with the image'),
    ('crop off by one', '05_fft', 'lo = (f.shape[-1] - s)//2\n    return f', 'lo = max(0, (f.shape[-1] - s)//2 - 1)\n    return f', 'frequency 0 is not at the centre of the crop'),
    ('crop from the corner', '05_fft', 'lo = (f.shape[-1] - s)//2\n    return f', 'lo = 0\n    return f', 'the highest frequencies are kept'),
    ('one side for the batch', '05_fft', 'return s[(inside < p*inside[:, -1:]).sum(1)]', 'return s[(inside < p*inside[:, -1:]).sum(1)].amax().expand(len(f))', 'the widest image sets the side of all'),
    ('share exceeded, not reached', '05_fft', '(inside < p*inside[:, -1:])', '(inside <= p*inside[:, -1:])', 'a square that holds the share exactly is passed over'),
    ('energy of one channel', '05_fft', 'f.double().square().sum(1).cumsum(1)', 'f.double().square()[:, 0].cumsum(1)', 'the side follows the real part of red'),
    ('magnitudes for energy', '05_fft', 'f.double().square().sum(1)', 'f.double().abs().sum(1)', 'the share is of the sum of magnitudes'),
    ('places from 0 on', '05_fft', 'tokens.to(out.dtype), places\n', 'tokens.to(out.dtype), torch.arange(len(places), device=x.device)\n', 'a token gets the position of another cell'),
    ('padding not told', '05_fft', 'padded=len(groups) > 1', 'padded=False', 'attention sees the padding'),
    ('high band shifted', '05_fft', "log_spectrum(x, shift=self.band == 'low')", 'log_spectrum(x)', 'the high band is the low band'),
    ('bins off centre', '05_fft', 'device=f.device) - f.shape[-1]//2', 'device=f.device) - (f.shape[-1] - 1)//2', 'distances are from the cell beside frequency 0'),
],
'SVD': [
    ('root forgotten', '06_svd', 'root = S[..., None, :].sqrt()', 'root = S[..., None, :]', 'u and v carry sigma, not its root'),
    ('u and v swapped', '06_svd', 'torch.cat([U*root, V*root], -2)', 'torch.cat([V*root, U*root], -2)', 'columns stand where rows belong'),
    ('v forgotten', '06_svd', 'torch.cat([U*root, V*root], -2)', 'torch.cat([U*root, U*root], -2)', 'a token holds u twice'),
    ('no sign convention', '06_svd', 'sign = U.gather(-2, first).sign()', 'sign = torch.ones_like(U[..., :1, :])', 'signs are as the solver leaves them'),
    ('sign of u alone', '06_svd', 'return U*sign, V*sign', 'return U*sign, V', 'u is turned and v is not'),
    ('one rank for the batch', '06_svd', 'real = index < k[:, None]', 'real = index < k.amax().expand(len(k), 1)', 'empty triplets become tokens'),
    ('energy per channel', '06_svd', 'S.double()).sum(1).cumsum(1)\n    return (held < p*held[:, -1:]).sum(1) + 1', 'S.double()).cumsum(2)\n    return ((held < p*held[..., -1:]).sum(2) + 1).amax(1)', 'the neediest channel sets the rank'),
    ('criteria swapped', '06_svd', "S.double()**2 if criterion == 'squared'", "S.double()**2 if criterion == 'linear'", 'linear is squared'),
    ('share exceeded, not reached', '06_svd', 'return (held < p*held[:, -1:]).sum(1) + 1', 'return (held <= p*held[:, -1:]).sum(1) + 1', 'a triplet too many where the share is met exactly'),
    ('largest rank below the share', '06_svd', 'return (held < p*held[:, -1:]).sum(1) + 1', 'return (held < p*held[:, -1:]).sum(1).clamp(min=1)', 'a triplet too few'),
    ('not the transposed', '06_svd', 'torch.linalg.eigh(x.double().mT @ x.double())', 'torch.linalg.eigh(x.double() @ x.double().mT)', 'left vectors are taken for right ones'),
    ('eigenvalues for singular values', '06_svd', 'lam, 0).sqrt(), V.flip(-1)\n', 'lam, 0), V.flip(-1)\n', 'sigma squared stands for sigma'),
    ('blocks trusted too soon', '06_svd', 'return k, (k <= S.shape[-1]) & clear & (worst <= 1e-4*total.sqrt())', 'return k, k <= S.shape[-1]', 'a rank is taken from triplets that have not converged'),
    ('total of one channel', '06_svd', 'total = x.square().sum((2, 3)).double().sum(1)', 'total = x.square().sum((2, 3)).double().amax(1)', 'the share is of the strongest channel'),
    ('rounding counted', '06_svd', 'torch.where(lam > lam.shape[-1]*torch.finfo(lam.dtype).eps*lam[..., :1], lam, 0)', 'lam.clamp(min=0)', 'at p=1 a flat image has as many triplets as rounding makes'),
],
'mSVD': [
    ('U twice', '07_msvd', 'torch.cat([self.u(x), self.v(x)], 1)', 'torch.cat([self.u(x), self.u(x)], 1)', 'V is never used'),
    ('one branch for both', '07_msvd', 'self.u, self.v = ConvStem(3, patch_size), ConvStem(3, patch_size)', 'self.u = self.v = ConvStem(3, patch_size)', 'U and V share their weights'),
    ('V of the transposed image', '07_msvd', 'torch.cat([self.u(x), self.v(x)], 1)', 'torch.cat([self.u(x), self.v(x.mT)], 1)', 'a token joins two places'),
    ('V not trained', '07_msvd', 'torch.cat([self.u(x), self.v(x)], 1)', 'torch.cat([self.u(x), self.v(x).detach()], 1)', 'no gradient reaches V'),
    ('grid transposed', '07_msvd', 'self.v(x)], 1).flatten(2).mT', 'self.v(x)], 1).mT.flatten(2).mT', 'tokens column by column'),
],
'scorer and selection': [
    ('gates not multiplied', '07_msvd', 'return x*gates', 'return x', 'no gradient reaches the scorer'),
    ('padding has gates', '07_msvd', '.sigmoid().masked_fill(~t.mask, 0)', '.sigmoid()', 'the mean gate counts padding'),
    ('scorer cut off', '07_msvd', 'logits = self.scorer(t.x)[..., 0]', 'logits = self.scorer(t.x.detach())[..., 0]', 'the gates do not train the tokenizer'),
    ('kept by gate', '02_select', 'order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[', 'order = (kept*(1. + t.scores)).argsort(dim=1, descending=True, stable=True)[', 'kept tokens are not in image order'),
    ('places start anew', '02_select', 't.index.gather(1, order), padded', 'torch.arange(order.shape[1], device=n.device).expand_as(order), padded', 'kept tokens forget where they come from'),
    ('scores not gathered', '02_select', 't.scores.gather(1, order)\n', 't.scores[:, :order.shape[1]]\n', 'kept tokens have the gates of others'),
    ('largest set below the share', '02_select', '_first(order, short + 1, mask)', '_first(order, short.clamp(min=1), mask)', 'the share is never reached'),
    ('share exceeded, not reached', '02_select', '(mass < float(self.p)*mass[:, -1:])', '(mass <= float(self.p)*mass[:, -1:])', 'a token too many where the share is met exactly'),
    ('one length for the batch', '02_select', '_first(order, short + 1, mask)', '_first(order, short.amax() + 1, mask)', 'the neediest image sets the length'),
    ('padding ranked', '02_select', '.clamp(min=1).masked_fill(~mask, 0)', '.clamp(min=1)', 'padding counts in the sum and takes places'),
    ('gates not in steps', '02_select', '(scores.double()*2**16).round().clamp(min=1)', 'scores.double()', 'rounding decides among equal tokens'),
    ('lowest gates', '02_select', 'steps.sort(dim=1, descending=True, stable=True)', 'steps.sort(dim=1, stable=True)', 'the least important tokens are kept'),
    ('ties in any order', '02_select', 'return steps.sort(dim=1, descending=True, stable=True)', 'g, at = steps.flip(1).sort(dim=1, descending=True, stable=True); return g, steps.shape[1] - 1 - at', 'of equal gates the last is kept'),
    ('padding not told', '02_select', 'padded=exporting or not bool(mask.all())', 'padded=False', 'attention sees the padding'),
    ('mean budget off by one', '02_select', 'round(len(mask)*(kept - 1))', 'round(len(mask)*kept)', 'a token too many on average'),
],
'encoder': [
    ('mask dropped', '04_vit', '    if t.padded: mask = F.pad(t.mask, (1, 0), value=True)\n    if t.padded and Packing.possible(x):\n        x, packing = pack(x, mask); mask = None\n', '', 'attention sees the padding'),
    ('mask not used', '04_vit', 'mask=None if mask is None else mask[:, None, None]', 'mask=None', 'attention sees the padding wherever nothing is packed'),
    ('mask of queries', '04_vit', 'mask=None if mask is None else mask[:, None, None]', 'mask=None if mask is None else mask[:, None, :, None]', 'padding is looked at, and does not look'),
    ('positions after selection', '04_vit', '    return self.encode(self.reduce(t, keep))', '    s = self.reduce(self.tokenizer(x), keep)\n    return self.encode(replace(s, x=s.x + self.pos_embed[1:1 + s.x.shape[1]]))', 'a kept token gets the position of its rank among the kept'),
    ('positions added twice', '04_vit', 'x=t.x + F.embedding(1 + t.index, pos)', 'x=t.x + 2*F.embedding(1 + t.index, pos)', 'positions weigh twice'),
    ('tokens doubled', '04_vit', 'x=t.x + F.embedding(1 + t.index, pos)', 'x=2*t.x + F.embedding(1 + t.index, pos)', '2x + pe, as the reported runs had it'),
    ('positions off by one', '04_vit', 'F.embedding(1 + t.index, pos)', 'F.embedding(t.index, pos)', "the first token has the class token's position"),
    ('positions in order', '04_vit', 'F.embedding(1 + t.index, pos)', 'pos[1:1 + t.x.shape[1]]', 'a token of a crop gets the position of another cell'),
    ('class token without position', '04_vit', 'cls = (self.cls_token + self.pos_embed[0])', 'cls = self.cls_token', 'position 0 is never added'),
    ('order of packing kept', '04_vit', 'x[packing.order.argsort()]', 'x[packing.order]', 'images get the logits of others'),
    ('packed by first length', '04_vit', 'lengths, order = mask.sum(1).sort(stable=True)', 'lengths, order = mask.sum(1), torch.arange(len(mask), device=mask.device)', 'sequences are taken for sorted'),
    ('one norm for both', '04_vit', 'self.mlp(self.norm2(x))', 'self.mlp(self.norm1(x))', 'norm2 is never used'),
    ('residual of the norm', '04_vit', 'h = self.attn(self.norm1(x), mask, packing, first)', 'x = self.norm1(x); h = self.attn(x, mask, packing, first)', 'the stream itself is normalised'),
    ('keys and values swapped', '04_vit', 'q, (k, v) = q.unflatten', 'q, (v, k) = q.unflatten', 'weights mean other things than elsewhere'),
    ('final norm left out', '04_vit', 'x = self.norm(self.blocks[-1](x, mask, packing, first=True))', 'x = self.blocks[-1](x, mask, packing, first=True)', 'the head reads the raw stream'),
],
'reductions': [
    ('padding summed up', '08_reduce', 'dropped = t.mask & ~kept', 'dropped = ~kept', 'an image that loses nothing gets a rest token'),
    ('rest of all', '08_reduce', 'gates = t.scores*dropped', 'gates = t.scores*t.mask', 'the rest token sums up the kept too'),
    ('rest without weights', '08_reduce', 'gates = t.scores*dropped', 'gates = dropped.to(t.scores.dtype)', 'gates have no say in the mean'),
    ('rest by the longest', '08_reduce', 'gates/gates.sum(1, keepdim=True).clamp(min=1e-6)', 'gates/dropped.sum(1).amax().clamp(min=1)', 'the mean depends on the batch'),
    ('rest not masked', '08_reduce', 'torch.cat([n > 0, short.mask], 1)', 'torch.cat([n >= 0, short.mask], 1)', 'nothing is summed up, and read'),
    ('attention over the kept', '08_reduce', '.masked_fill(~dropped, -1e9).softmax(1)', '.softmax(1)', 'the weights of the dropped do not sum to 1'),
    ('padding merged', '08_reduce', 't.x.dtype)*t.mask[..., None]', 't.x.dtype)', 'padding joins a token'),
    ('merged into padding', '08_reduce', 'to = like.masked_fill(~short.mask[:, None], -math.inf).argmax(-1)', 'to = like.argmax(-1)', 'a token may join padding and be lost'),
    ('merge sums', '08_reduce', 'weight.mT @ t.x/weight.sum(1)[..., None].clamp(min=1)', 'weight.mT @ t.x', 'a token that was joined is larger'),
    ('likeness without norm', '08_reduce', 'F.normalize(t.x, dim=-1) @ F.normalize(short.x, dim=-1).mT', 't.x @ short.x.mT', 'the largest token draws all'),
    ('queries read padding', '08_reduce', 'key_padding_mask=~t.mask if t.padded else None', 'key_padding_mask=None', 'an answer depends on the batch'),
    ('budget not told', '08_reduce', 'torch.cat([t.x, budget], -1)', 'torch.cat([t.x, 0*budget], -1)', 'the factor is the same at every budget'),
    ('noise in evaluation', '08_reduce', 'if self.training and keep is not None', 'if keep is not None', 'every call keeps others'),
    ('straight through nothing', '08_reduce', 'return x*(1 + (gates - gates.detach()))', 'return x', 'no gradient reaches the scorer'),
]}

def source(cell): return ''.join(cell['source'])
def flags(cell): return ' '.join(line[2:] for line in source(cell).splitlines() if line.startswith('#|')).replace('eval: false', 'never').split()

def mutated(text, notebook, old, new):
    "A notebook's text with one exported cell changed"
    nb = json.loads(text)
    exported = [c for c in nb['cells'] if c['cell_type'] == 'code' and {'export', 'exports', 'exporti'} & set(flags(c))]
    if (n := sum(source(c).count(old) for c in exported)) != 1: sys.exit(f'{notebook}: the exported cells hold {n} times, not once: {old!r}')
    for c in exported: c['source'] = source(c).replace(old, new).splitlines(True)
    return json.dumps(nb)

def run_notebook(copy, notebook, changed):
    "The first line that fails in a notebook, as `nbdev_test` runs it; None if all pass"
    from execnb.shell import CaptureShell
    from hypothesis import Phase, settings
    from nbdev.export import nb_export
    sys.path.insert(0, str(copy)); sys.dont_write_bytecode = True; os.chdir(copy)
    if changed: nb_export(copy/f'nbs/{changed}.ipynb', copy/'sigma_tokenizer')
    import sigma_tokenizer  # now, not before the export
    if Path(sigma_tokenizer.__file__).parent != copy/'sigma_tokenizer': raise RuntimeError('the tests would not use the copy')
    settings.register_profile('found', phases=[Phase.explicit, Phase.generate]); settings.load_profile('found')  # a case that fails will do, it need not be the smallest
    os.chdir(copy/'nbs'); shell = CaptureShell(copy/'nbs')
    for cell in json.loads((copy/f'nbs/{notebook}.ipynb').read_text())['cells']:
        if cell['cell_type'] != 'code' or {'slow', 'cuda', 'never'} & set(flags(cell)): continue
        e = shell.run_cell(source(cell)).exception
        if e is None: continue
        frames = traceback.extract_tb(e.__traceback__); own = [f for f in frames if f.filename == next((f.filename for f in frames if 'ipykernel' in f.filename or f.filename.startswith('<ipython')), None)]
        lines = source(cell).splitlines(); line = lines[own[-1].lineno - 1] if own else next(l for l in lines if not l.startswith('#|'))
        return f'{line.strip()[:200]}  [{type(e).__name__}]'

def forked(seconds, f, *args):
    "What f(*args) returns, from a process of its own; an exception or too long a run is a message"
    reads, writes = os.pipe(); pid = os.fork()
    if pid == 0:
        os.close(reads); out = None; os.dup2(os.open(os.devnull, os.O_WRONLY), 1); signal.alarm(seconds)
        try: out = f(*args)
        except BaseException as e: out = f'[{type(e).__name__}] {str(e)[:200]}'
        finally: os.write(writes, json.dumps(out).encode()); os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as p: said = p.read()
    os.waitpid(pid, 0); return json.loads(said) if said else f'ended without a word, or ran longer than {seconds} s'

def in_copy(copy, notebook, changed=None):
    "Run one notebook's tests in a copy of the repository"
    return forked(300, run_notebook, copy, notebook, changed)

def make_copy(folder):
    "What export and tests need of the repository"
    for name in ('nbs', 'sigma_tokenizer'): shutil.copytree(root/name, folder/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'setup.py', 'README.md', '_quarto.yml'): shutil.copy(root/name, folder/name)
    (folder/'results').symlink_to(root/'results'); return folder

def meet(mutant):
    "Which test catches a mutant"
    tokenizer, name, notebook, old, new, what = mutant; start = time.time()
    with tempfile.TemporaryDirectory() as tmp:
        copy = make_copy(Path(tmp).resolve()); path = copy/f'nbs/{notebook}.ipynb'; path.write_text(mutated(path.read_text(), notebook, old, new))
        own = in_copy(copy, notebook, notebook); seen = in_copy(copy, hunt) if args.also or not own else None
        test = own or seen or in_copy(copy, last)
        if test and test.startswith(('[', 'ended')): sys.exit(f'{tokenizer}: {name}: no test failed, but {test}')  # an export or a process that broke proves nothing
        caught_by = notebook if own else hunt if seen else last if test else None
    row = dict(tokenizer=tokenizer, mutant=name, what=what, notebook=notebook, caught_by=caught_by, test=test, **({'also': seen} if args.also else {}), seconds=round(time.time() - start, 1))
    print(f'{tokenizer}: {name}: ' + (f'{caught_by}: {test}' if caught_by else 'SURVIVED') + (f'  ({hunt} alone does not see it)' if args.also and caught_by and not seen else ''), flush=True); return row

if __name__ == '__main__':
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--only', default='', metavar='TEXT', help='mutants with this in "tokenizer: name"'); args.add_argument('--jobs', type=int, default=2, metavar='N', help='processes at a time (2)')
    args.add_argument('--also', action='store_true', help='ask of every mutant whether 19_properties alone catches it')
    args.add_argument('--out', type=Path, metavar='FILE', help='results/robustness/mutants.json; nowhere with --only'); args = args.parse_args(); start = time.time()
    if args.out is None and not args.only: args.out = root/'results/robustness/mutants.json'
    todo = [(t, *m) for t, ms in mutants.items() for m in ms if args.only.lower() in f'{t}: {m[0]}'.lower()]
    for t, name, notebook, old, new, _ in todo: mutated((root/f'nbs/{notebook}.ipynb').read_text(), notebook, old, new)
    warnings.simplefilter('ignore'); import execnb.shell, hypothesis, matplotlib.pyplot, nbdev.export, pandas, sklearn.metrics, torch  # once, for all the processes that are forked
    torch.set_num_threads(1)
    from multiprocessing import get_context
    with tempfile.TemporaryDirectory() as tmp, ThreadPoolExecutor(args.jobs) as pool:
        copy = make_copy(Path(tmp).resolve()); names = sorted({m[2] for m in todo} | {last, hunt})
        for nb, failed in zip(names, pool.map(lambda nb: in_copy(copy, nb), names)):
            if failed: sys.exit(f'nothing was changed, and {nb} fails: {failed}')
    print(f'without a change {", ".join(names)} pass; {len(todo)} mutants', flush=True)
    with ThreadPoolExecutor(args.jobs) as pool: rows = list(pool.map(meet, todo))
    if args.out: args.out.parent.mkdir(parents=True, exist_ok=True); args.out.write_text(json.dumps(rows, indent=1) + '\n')
    alive = [f'{r["tokenizer"]}: {r["mutant"]}' for r in rows if not r['caught_by']]
    print(f'{len(rows) - len(alive)} of {len(rows)} caught, ' + (f'{sum(bool(r["also"]) for r in rows)} by {hunt} alone, ' if args.also else '') + f'in {time.time() - start:.0f} s' + ''.join(f'\nSURVIVED {a}' for a in alive))
    sys.exit(bool(alive))
