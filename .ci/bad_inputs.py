"""Every bad input that we could think of, given to the package: what is said, what is left out, and whether anything was lost.

    python .ci/bad_inputs.py     half a minute

Each row is one thing that is odd or wrong in a place where all else is right; some are to be used, most to be refused. It says what came of it: a message, with which the call stopped, or what was used and what was left out, and counted. After each, all files that were there before are
compared with what they were. Writes results/robustness/bad_inputs.json; exits 1 if a message is not the one expected, or a file was changed or made.
"""
import contextlib, hashlib, io, json, math, os, pickle, re, shutil, sys, tarfile, tempfile, traceback, warnings, zipfile
from pathlib import Path
from unittest.mock import patch
import numpy as np, torch
from PIL import Image
from torch import nn
from sigma_tokenizer import Mass, TopK, create_model
from sigma_tokenizer.data import digits_data, folder_data, image_loaders, load_data
from sigma_tokenizer.files import locked
from sigma_tokenizer.models import SigmaModel
from sigma_tokenizer.reproduce import reproduce
from sigma_tokenizer.results import load_predictions, load_result
from sigma_tokenizer.runs import load_preset
from sigma_tokenizer.training import create_learner, train

torch.manual_seed(0); rng = np.random.default_rng(0)
home = Path(tempfile.mkdtemp()); os.environ['XDG_CACHE_HOME'] = str(home/'cache')
(home/'cache/sigma_tokenizer').mkdir(parents=True); rows, wrong = [], []

def photo(i, size=(64, 48)): return Image.fromarray(np.clip(rng.normal(128, 20, (size[1], size[0], 3)) + np.linspace(-90, 90, size[0])[:, None]*(1 if i % 2 else -1), 0, 255).astype(np.uint8))
def snapshot(): return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() and not p.is_symlink() else 'other' for p in home.rglob('*') if p.suffix != '.lock' and p.name != '.lock' and not re.search('cache/sigma_tokenizer/(unpacked-)?[0-9a-f]{32}', str(p))}  # but for locks, and the cache's own folders

def data_set():
    "A good one, new"
    shutil.rmtree(home/'photos', ignore_errors=True)
    for split, n in (('train', 4), ('test', 2)):
        for i, c in enumerate(('flower', 'temple')):
            (home/'photos'/split/c).mkdir(parents=True)
            for j in range(n): photo(i).save(home/'photos'/split/c/f'{j}.png')
    return home/'photos'

def tried(group, what, expected, call):
    "Make the call; what it says must match `expected`, and no file may differ afterwards"
    before, said = snapshot(), ''
    with warnings.catch_warnings(record=True, action='always') as warned, contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        try: said = call() or ''
        except (ValueError, OSError, RuntimeError, ArithmeticError) as e: said = f'{type(e).__name__}: {e}'
        except Exception: said = 'NOT CAUGHT ' + traceback.format_exc()
    said = ' '.join(f'{said} {" ".join(str(w.message) for w in warned if "left out" in str(w.message) or "pixel for pixel" in str(w.message))}'.replace(str(home) + '/', '').split())
    said = re.sub(r'process \d+ on \S+, since \S+ \S+: ', 'process PID on HOST, since TIME: ', re.sub('[0-9a-f]{32}', 'KEY', said))
    after = snapshot(); lost = sorted(k for k in {*before, *after} if before.get(k) != after.get(k))
    if not re.search(expected, said) or lost: wrong.append((what, said, lost))
    rows.append(dict(group=group, what=what, said=ascii(said)[1:-1][:300].replace("\\'", "'"), lost=len(lost)))

# files of a data set
jpeg = io.BytesIO(); photo(0).save(jpeg, 'JPEG'); jpeg = jpeg.getvalue()
exif = Image.Exif(); exif[0x112] = 6
def save(**kw): return lambda f, im=None: (im or photo(0)).save(f, **kw)
FILES = {  # what it is: name, how it is made, what is expected
    'a truncated JPEG': ('x.jpg', lambda f: f.write_bytes(jpeg[:len(jpeg)//2]), 'truncated'), 'zero bytes': ('x.jpg', lambda f: f.write_bytes(b''), 'no image; accepted'),
    'text named .jpg': ('x.jpg', lambda f: f.write_text('text'), 'no image; accepted'), 'EPS named .jpg, which would start another program': ('x.jpg', lambda f: f.write_text('%!PS-Adobe-3.0 EPSF-3.0\n'), 'no image; accepted'),
    'a CMYK JPEG': ('x.jpg', lambda f: photo(0).convert('CMYK').save(f), '^9 used'), 'a palette PNG': ('x.png', lambda f: photo(0).convert('P').save(f), '^9 used'), 'a grey PNG': ('x.png', lambda f: photo(0).convert('L').save(f), '^9 used'),
    'a 16-bit PNG': ('x.png', lambda f: Image.fromarray(np.asarray(photo(0).convert('L')).astype(np.uint16) << 8).save(f), '^9 used'), 'a PNG with transparency': ('x.png', lambda f: photo(0).convert('RGBA').save(f), '^9 used'),
    'a JPEG with EXIF rotation': ('x.jpg', lambda f: photo(0).save(f, exif=exif), '^9 used'), 'an animated GIF': ('x.gif', lambda f: photo(0).save(f, save_all=True, append_images=[photo(1)]), '^9 used'),
    'a 32-bit TIFF': ('x.tiff', lambda f: Image.fromarray(np.ones((9, 9), np.float32)).save(f), '32-bit pixels'), '1x1 pixels': ('x.png', lambda f: photo(0, (1, 1)).save(f), '1x1 pixels; accepted: at least 8x8'),
    '20,000x20,000 pixels': ('x.png', lambda f: Image.new('L', (20_000, 20_000)).save(f), '400000000 pixels'), '10,000x10,000 pixels': ('x.png', lambda f: Image.new('L', (10_000, 10_000)).save(f), '10000x10000 pixels; accepted'),
    'a name that is not ASCII': ('caf\u00e9 \u6d77.png', save(), '^9 used'), 'a name that is no text': (os.fsdecode(b'\xff.png'), save(), '^9 used'), 'a folder named .jpg': ('x.jpg', lambda f: f.mkdir(), 'a folder; accepted'),
    'a link to nowhere': ('x.jpg', lambda f: f.symlink_to('nowhere'), 'no file'), 'a pipe, which never ends': ('x.jpg', lambda f: os.mkfifo(f), 'no file')}
def use(path, strict=False):
    with contextlib.redirect_stdout(printed := io.StringIO()), patch('sigma_tokenizer.data.progress_bar', lambda x, **kw: x): d = folder_data(path, 32, strict=strict)
    return f'{len(d.train)} used; ' + ' '.join(line for line in printed.getvalue().splitlines() if 'damaged' in line)
for what, (name, make, expected) in FILES.items():
    root = data_set(); make(root/'train/flower'/name)
    tried('a file of a data set', what, expected, lambda: use(root))
    if '9 used' not in expected: tried('the same with --strict', what, f'ValueError: data: .*{expected}', lambda: use(root, strict=True))

# folders, archives
def spoilt(what, expected, change, group='a data set', load=use):
    root = data_set(); out = change(root) or root
    tried(group, what, expected, lambda: load(out))
spoilt('no such folder', 'no folder photos/none; accepted', lambda r: r/'none'); spoilt('no splits', 'holds test/, training/; accepted', lambda r: (r/'train').rename(r/'training') and None)
spoilt('an empty class folder', 'no images in photos/train/sea', lambda r: (r/'train/sea').mkdir()); spoilt('class names that differ', 'class folders differ', lambda r: (r/'test/flower').rename(r/'test/flowers') and None)
spoilt('a class without a readable image', 'no readable image in photos/train for flower', lambda r: [f.write_bytes(b'') for f in (r/'train/flower').iterdir()] and None)
spoilt('an image in no class folder', '1 of 13 files .* in no class folder', lambda r: photo(0).save(r/'train/x.png'))
spoilt('the same image in train and test', 'in the training split, pixel for pixel', lambda r: shutil.copy(r/'train/flower/0.png', r/'test/temple/x.png') and None)
spoilt('the same with --strict', 'are the same image; accepted', lambda r: shutil.copy(r/'train/flower/0.png', r/'test/temple/x.png') and None, load=lambda r: use(r, True))
def hidden(r):
    with patch.object(Path, 'iterdir', side_effect=PermissionError(13, 'Permission denied')): return use(r)
spoilt('a folder without the permission to list it (simulated)', 'cannot be listed: Permission denied', lambda r: None, load=hidden)
for name, size in (('a cache, cut short', 99), ('a cache, emptied', 0)):
    root = data_set(); use(root); cache = max((home/'cache').glob('*/*/images.npy'), key=lambda p: p.stat().st_mtime_ns); os.truncate(cache, size); tried('a cache', name, '^8 used; made again', lambda: use(root))
root = data_set(); use(root); meta = max((home/'cache').glob('*/*/meta.json'), key=lambda p: p.stat().st_mtime_ns); meta.write_text(meta.read_text().replace('"version": 2', '"version": 1')); tried('a cache', 'a cache of another version', '^8 used; made again', lambda: use(root))
def tarred(name, arcname, **kw):
    with tarfile.open(home/name, 'w') as t:
        if kw: info = tarfile.TarInfo(arcname); [setattr(info, k, v) for k, v in kw.items()]; t.addfile(info)
        else: t.add(home/'photos', arcname)
    return home/name
def zipped(name, arcname):
    with zipfile.ZipFile(home/name, 'w') as z: z.writestr(arcname, 'x')
    return home/name
load = lambda f: f'{len(load_data(str(f), 32).train)} used'
spoilt('a good tar', '^8 used', lambda r: tarred('a.tar', 'photos'), 'an archive', load)
for arc in ('../out', '../../../out', str(home/'out.txt')): spoilt(f'a tar with the path {arc}'.replace(str(home), ''), 'a path that leads out of it', lambda r: tarred('a.tar', arc, size=0), 'an archive', load); spoilt(f'a zip with the path {arc}'.replace(str(home), ''), 'a path that leads out of it', lambda r: zipped('a.zip', arc), 'an archive', load)
for kind, name in ((tarfile.SYMTYPE, 'symbolic link'), (tarfile.LNKTYPE, 'hard link'), (tarfile.CHRTYPE, 'device')): spoilt(f'a tar with a {name}', 'a link or a device', lambda r: tarred('a.tar', 'x', type=kind, linkname='/etc/passwd'), 'an archive', load)
spoilt('a tar that claims 32 TiB', 'damaged one|accepted: up to', lambda r: tarred('a.tar', 'x', size=0) and Path(home/'a.tar').write_bytes((i := tarfile.TarInfo('x'), setattr(i, 'size', 2**45), i.tobuf())[-1] + bytes(1024)) and home/'a.tar', 'an archive', load)
def broken_header(r):
    f = tarred('a.tar', 'photos'); content = bytearray(f.read_bytes())
    with tarfile.open(f) as t: at = t.getmembers()[-3].offset
    content[at:at+9] = b'?'*9; f.write_bytes(content); return f
def twice(r):
    with zipfile.ZipFile(home/'a.zip', 'w') as z: z.writestr('x', '1'); z.writestr('x', '2')
    return home/'a.zip'
spoilt('a tar with a broken header in the middle', 'its end is missing', broken_header, 'an archive', load); spoilt('a zip with the same name twice', "holds 'x', twice", twice, 'an archive', load)
spoilt('a tar with a header of 2 GiB', 'a header of 2147483648 bytes', lambda r: tarred('a.tar', 'x', type=tarfile.XHDTYPE, size=2**31), 'an archive', load); spoilt('an archive without a data set', 'data: .* accepted', lambda r: tarred('a.tar', 'x', size=0), 'an archive', load)
spoilt('text named .tar', 'no zip or tar archive', lambda r: (home/'a.tar').write_text('x') and home/'a.tar', 'an archive', load)

# files that could hold a program
class Program:
    def __reduce__(self): return (Path.touch, (home/'broken in',))
small = dict(image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
create_model('msvd_gated', **small).save_pretrained(home/'model'); good_config = (home/'model/config.json').read_text(); good_weights = (home/'model/model.safetensors').read_bytes()
def model_with(what, expected, config=None, weights=None):
    (home/'model/config.json').write_text(config or good_config)
    if weights is None: (home/'model/model.safetensors').write_bytes(good_weights)
    else: weights(home/'model/model.safetensors')
    tried('a model from a stranger', what, expected, lambda: SigmaModel.from_pretrained(home/'model') and 'read')
model_with('a good one', '^read'); model_with('a pickle as the weights', 'no safetensors file', weights=lambda f: f.write_bytes(pickle.dumps(Program()))); model_with("torch.save's pickle as the weights", 'no safetensors file', weights=lambda f: torch.save(Program(), f))
model_with('weights cut short', 'no safetensors file', weights=lambda f: f.write_bytes(good_weights[:-9])); change = lambda **kw: json.dumps(json.loads(good_config) | kw)
model_with('a field that nobody knows', '__reduce__: no such field', change(__reduce__='os.system')); model_with('a name that is none', "name: got 'os.system'", change(name='os.system')); model_with('a size without end', 'depth: got 1000000000', change(depth=10**9))
model_with('another type', "embed_dim: got '16'", change(embed_dim='16')); model_with('sizes that the weights do not have', 'got .* accepted', change(embed_dim=32)); model_with('no JSON', 'no JSON', '{"name"'); model_with('ten thousand brackets', 'no JSON: recursion limit', '['*10_000)
out = home/'out'; reproduce_kw = dict(methods=['vit'], epochs=1, holdout=.2, device='cpu', out=str(out))
with contextlib.redirect_stdout(io.StringIO()): reproduce(**reproduce_kw)
result = out/'vit-seed239.json'; good_result, good_npz = result.read_text(), result.with_suffix('.npz').read_bytes()
def result_with(what, expected, text=None, npz=None):
    result.write_text(text or good_result); result.with_suffix('.npz').write_bytes(good_npz)
    if npz: npz(result.with_suffix('.npz'))
    tried('a result from a stranger', what, expected, lambda: [load_result(result), load_predictions(result)] and 'read')
result_with('a good one', '^read'); result_with('a path as the name of the run', "run: got '../../x'", json.dumps(json.loads(good_result) | dict(run='../../x'))); result_with('an accuracy of NaN', 'accuracy: got nan', re.sub(r'"accuracy": [\d.]+', '"accuracy": NaN', good_result))
result_with("another run's result", 'holds another run', good_result.replace('"seed": 239', '"seed": 1')); result_with('no JSON', 'no JSON', good_result[:-20]); result_with('a pickle among the predictions', 'Object arrays cannot be loaded', npz=lambda f: np.savez(f, labels=np.array([Program()], dtype=object), preds=1, lengths=1))
result_with('predictions cut short', 'no predictions', npz=lambda f: f.write_bytes(good_npz[:-50])); result.write_text(good_result); result.with_suffix('.npz').write_bytes(good_npz)
for f in out.glob('vit*'): f.unlink()
def one_bit(f):
    torch.save(dict(model=torch.arange(9999)), f); content = bytearray(f.read_bytes()); content[len(content)//2] ^= 1; f.write_bytes(content)
for what, spoil in [('a pickle as the checkpoint', lambda f: f.write_bytes(pickle.dumps(Program()))), ("torch.save's pickle", lambda f: torch.save(Program(), f)), ('a checkpoint cut short', lambda f: f.write_bytes(b'PK' + bytes(99))), ('a checkpoint with one bit flipped', one_bit)]:
    spoil(out/'vit-seed239.ckpt'); tried('a checkpoint from a stranger', what, 'is no checkpoint.* Delete it', lambda: reproduce(**reproduce_kw))
(out/'vit-seed239.ckpt').unlink(); preset = (Path(sys.modules['sigma_tokenizer'].__file__).parent/'presets/quick.toml').read_text()
for what, old, new, expected in [('a field misspelt', 'epochs = ', 'epoch = ', 'train.epochs: missing'), ('another type', 'epochs = 12', 'epochs = "12"', "train.epochs: got '12'"), ('an infinite learning rate', 'lr = 3e-3', 'lr = inf', 'train.lr: got inf'), ('a run that is none', '"vit"', '"vitt"', "got 'vitt'"),
                                 ('a width that its heads do not divide', 'num_heads = 4', 'num_heads = 5', 'a divisor of embed_dim'), ('no TOML', '[train]', '[train', 'no TOML')]:
    (home/'mine.toml').write_text(preset.replace(old, new, 1)); tried('a preset', what, expected, lambda: reproduce(**reproduce_kw | dict(preset=str(home/'mine.toml'))))
with locked(out): tried('the command', 'a second run into one folder', 'in use by process', lambda: reproduce(**reproduce_kw))
for what, kw, expected in [('a run that is none', dict(methods=['vitt']), 'methods: got vitt'), ('epochs=0', dict(epochs=0), 'epochs: got 0'), ('a device that is none', dict(device='gpu'), "device: got 'gpu'"), ('holdout=1', dict(holdout=1), 'holdout: got 1'), ('jobs=0', dict(jobs=0), 'jobs: got 0'), ('a negative seed', dict(seeds=[-1]), 'seeds: got -1')]: tried('the command', what, expected, lambda: reproduce(**reproduce_kw | kw))

# images and budgets
model = create_model('msvd_gated', **small).eval(); x = torch.rand(2, 3, 32, 32)
def images(what, expected, x, model=model, keep=None): tried('images and budgets', what, expected, lambda: (lambda y: f'logits {tuple(y.shape)}' if y.isfinite().all() else 'NaN')(model(x, keep=keep)))
bad = x.clone(); bad[0, 0, 0, 0] = math.nan; inf = x.clone(); inf[1, 2, 3, 4] = -math.inf
images('NaN among the pixels', 'NaN or infinite values', bad); images('infinity among the pixels', 'NaN or infinite values', inf); images('an empty batch', 'an empty batch', x[:0]); images('one image', r'logits \(1, 6\)', x[:1]); images('one image without its batch', '3 dimensions', x[0])
images('float64', 'dtype torch.float64', x.double()); images('float16', 'dtype torch.float16', x.half()); images('uint8', 'dtype torch.uint8', (x*255).byte()); images('one channel', '1 channels', x[:, :1]); images('not square', '32x24 pixels', x[..., :24]); images('a side of 30', 'side 30', x[..., :30, :30])
images('channels last', 'logits', x.contiguous(memory_format=torch.channels_last)); images('not contiguous', 'logits', x.mT); images('an array of NumPy', 'a ndarray', x.numpy()); images('k larger than N', 'logits', x, keep=TopK(99)); images('p=1', 'logits', x, keep=Mass(1)); images('p tiny', 'logits', x, keep=Mass(1e-12))
for name, kw in (('fft', dict(energy=.9)), ('svd', {}), ('svd', dict(energy=1.)), ('svd', dict(criterion='linear'))): images(f'a black and a flat image, {name} {kw or ""}', 'logits', torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), .3)]), create_model(name, **small, **kw).eval())
for what, make in [('k=0 where nothing sums up the rest', lambda: model(x, keep=TopK(0))), ('k=-1', lambda: TopK(-1)), ('k=1.5', lambda: TopK(1.5)), ('p=0', lambda: Mass(0)), ('p=1.1', lambda: Mass(1.1)), ('p=NaN', lambda: Mass(math.nan)), ('a budget that is a number', lambda: model(x, keep=16)), ('a budget without gates', lambda: create_model('vit', **small)(x, keep=TopK(4)))]:
    tried('images and budgets', what, r'ValueError: (k|p|keep): got .*; accepted: ', make)
model.train(); images('training mode and a budget for each image', 'logits', x, keep=Mass(.5))

# numbers
learn = create_learner(create_model('vit', image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, n_classes=10), image_loaders(digits_data(16), 512)); learn.model.head[-1].bias.data[0] = math.nan
def diverge():
    with learn.no_bar(), learn.no_logging(): train(learn, 1, 1e-3, 'constant', path=home/'nan.ckpt')
tried('numbers', 'a loss of NaN', 'loss: got nan in epoch 1, step 1 of 2.*The batch: image .* The last good checkpoint: none', diverge)

shutil.rmtree(home)
out = Path(__file__).parent.parent/'results/robustness/bad_inputs.json'
out.parent.mkdir(parents=True, exist_ok=True); out.write_text(json.dumps(rows, indent=1) + '\n')
print(f'{len(rows)} bad inputs, {sum(r["lost"] for r in rows)} files changed or made by them; {out}')
for w in wrong: print('WRONG', *w, sep='\n   ')
sys.exit(len(wrong) > 0)
