"Files from anyone: nothing in them is run, what is wrong is named, and a failed write loses nothing"
import io, os, pickle, struct, subprocess, sys, zlib
from pathlib import Path
import matplotlib, numpy as np, pytest, torch
from PIL import Image
from sigma_tokenizer import SigmaModel, create_model
from sigma_tokenizer.repro.results import load_predictions, load_result, save_result
from sigma_tokenizer.data import atomic_write
from sigma_tokenizer.repro.folders import folder_data
from sigma_tokenizer.predict import sigma_predict
from sigma_tokenizer.repro.experiments import load_preset
from sigma_tokenizer.checkpoint import Checkpoint
from sigma_tokenizer.tokens import sample_photos
from conftest import small

class Program:
    "A pickle of this makes a file when it is loaded"
    def __init__(self, file): self.file = file
    def __reduce__(self): return Path.touch, (self.file,)

def pickles(ran):
    "Files that would run a program, and one that is cut short"
    torch.save(Program(ran), f := io.BytesIO())
    return [pickle.dumps(Program(ran)), f.getvalue(), b'PK' + bytes(99), b'']

def test_a_pickle_is_no_model(tmp_path):
    create_model('msvd_gated', **small).save_pretrained(tmp_path)
    weights = tmp_path/'model.safetensors'; good = weights.read_bytes(); SigmaModel.from_pretrained(tmp_path)
    for bad in [*pickles(tmp_path/'ran'), good[:-9]]:
        weights.write_bytes(bad)
        with pytest.raises(ValueError, match=tmp_path.name): SigmaModel.from_pretrained(tmp_path)
    weights.write_bytes(good); create_model('msvd_gated', **small | dict(depth=1)).save_pretrained(tmp_path/'other')
    (tmp_path/'other/config.json').rename(tmp_path/'config.json')
    with pytest.raises(ValueError, match='(?s)Unexpected key'): SigmaModel.from_pretrained(tmp_path)
    weights.rename(tmp_path/'pytorch_model.bin')
    with pytest.raises(FileNotFoundError): SigmaModel.from_pretrained(tmp_path)
    assert not (tmp_path/'ran').exists()

def test_a_pickle_is_no_checkpoint(tmp_path):
    for bad in pickles(tmp_path/'ran'):
        (tmp_path/'a.ckpt').write_bytes(bad)
        with pytest.raises(ValueError, match='a.ckpt: no checkpoint'): Checkpoint(tmp_path/'a.ckpt').load(None, 1)
    assert not (tmp_path/'ran').exists()

row = dict(row='ViT', budget='all', accuracy=.5, f1=.4, mean_length=65., images=4)
data = dict(name='x', evaluated='test', classes=['a', 'b'], train=9, test=4, fingerprint='f', unreadable=[])
result = dict(run='vit', seed=1, config=dict(sparsity=0.), data=data, commit=None, versions={'torch': '2'},
              device='cpu', seconds=1., epochs=[dict(epoch=0, train_loss=.1)], scores=None, rows=[row])
predictions = dict(labels=np.arange(4), preds=np.arange(4)[None], lengths=np.full((1, 4), 300),
                   confidence=np.ones((1, 4)))

def test_results(tmp_path):
    path = save_result(tmp_path, result, predictions); good = path.read_text()
    assert load_result(path) == result
    for k, v in load_predictions(path).items(): assert (v == predictions[k]).all()
    for bad in [good[:-20], '', '[]', '['*9999, good.replace('0.5', 'NaN'), good.replace('"seed": 1', '"seed": "1"'),
                good.replace('"device"', '"devise"')]:
        path.write_text(bad)
        with pytest.raises(ValueError, match=path.name): load_result(path)
    program = np.array([Program(tmp_path/'ran')], dtype=object)
    with open(path.with_suffix('.npz'), 'wb') as f: np.savez(f, labels=program)
    with pytest.raises(ValueError, match='Object arrays cannot be loaded'): load_predictions(path)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('old, new, named', [
    ('data = ', 'more = 1\ndata = ', 'more'), ('epochs = ', 'warmup = 1\nepochs = ', 'warmup'),
    ('epochs = 12', 'epochs = "12"', 'epochs'), ('lr = 3e-3', 'lr = inf', 'lr'),
    ('"vit"', '"vitt"', 'vitt'), ('[train]', '[train', 'mine.toml')])
def test_presets(old, new, named, tmp_path):
    quick = (Path(load_preset.__globals__['__file__']).parent/'presets/quick.toml').read_text()
    assert old in quick; (tmp_path/'mine.toml').write_text(quick.replace(old, new, 1))
    with pytest.raises(ValueError, match=f'(?s)mine.toml: .*{named}|{named}: '): load_preset(str(tmp_path/'mine.toml'))

def huge_header():
    "A PNG that says it has 10^10 pixels"
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    return b'\x89PNG\r\n\x1a\n' + (
        chunk(b'IHDR', struct.pack('>IIBBBBB', 10**5, 10**5, 8, 2, 0, 0, 0)) + chunk(b'IDAT', b''))

def photo(file, x=None, kind=None):
    "Save noise, or these pixels"
    if x is None: x = np.random.default_rng(zlib.crc32(str(file).encode())).integers(0, 255, (48, 64, 3), np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(x).save(file, kind)

@pytest.fixture
def folder(tmp_path, monkeypatch):
    "Two classes, 8 training images and 4 test images; the cache is elsewhere"
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache')); root = tmp_path/'photos'
    for split, n in (('train', 4), ('test', 2)):
        for c in 'ab':
            for i in range(n): photo(root/split/c/f'{i}.jpg')
    return root

def test_unreadable_images(folder, tmp_path):
    jpeg = (folder/'train/a/0.jpg').read_bytes(); png = io.BytesIO(); Image.new('L', (1, 1)).save(png, 'PNG')
    bad = {'cut.jpg': jpeg[:len(jpeg)//2], 'text.jpg': b'text', 'empty.jpg': b'', 'huge.png': huge_header(),
           'dot.png': png.getvalue(), 'README': b'text', 'notes.txt': b'text',
           'eps.jpg': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n'}
    for name, content in bad.items(): (folder/'train/a'/name).write_bytes(content)
    (folder/'test/b/nowhere.jpg').symlink_to('nowhere')
    with pytest.warns(UserWarning) as warned: found = folder_data(folder, 32)
    names = {*(f'train/a/{n}' for n in bad), 'test/b/nowhere.jpg'}
    assert {f for f, _ in found.left_out} == names and all(why for _, why in found.left_out)
    assert 'cannot identify' in dict(found.left_out)['train/a/eps.jpg']  # reading it would start another program
    assert f'{len(names)} files in' in str(warned[0].message) and all(n in str(warned[0].message) for n in names)
    assert (len(found.train), len(found.test)) == (8, 4) and found.train.images.shape == (8, 40, 40, 3)
    with pytest.warns(UserWarning): again = folder_data(folder, 32)  # of the cache
    assert again.left_out == found.left_out and again.fingerprint == found.fingerprint
    with pytest.raises(SystemExit) as e: sigma_predict(str(folder/'train/a/cut.jpg'), out=str(tmp_path))
    assert e.value.code == 1 and not [*tmp_path.glob('*.png')]

@pytest.mark.filterwarnings('error')
def test_what_others_leave_in_a_folder(folder):
    clean = folder_data(folder, 32)
    for d in ('train', 'train/a', 'test/b/deeper'):
        for name in ('@eaDir', '__MACOSX', '.thumbnails', '$RECYCLE.BIN'): photo(folder/d/name/'0.jpg'/'small.jpg')
        (folder/d/'lost+found').mkdir()
        for name in ('Thumbs.db', 'desktop.ini', '._0.jpg'): (folder/d/name).write_bytes(b'')
    found = folder_data(folder, 32)
    assert found.classes == ['a', 'b'] and found.train.files == clean.train.files
    assert found.fingerprint == clean.fingerprint

@pytest.mark.filterwarnings('error')
def test_any_ending_of_an_image(folder):
    kinds = dict(JPG='JPEG', jfif='JPEG', jpe='JPEG', apng='PNG', dib='BMP', TIF='TIFF', webp='WEBP', pnm='PPM')
    for end, kind in kinds.items(): photo(folder/f'train/a/x.{end}', kind=kind)
    photo(folder/'train/b/none', kind='JPEG')
    assert len(folder_data(folder, 32).train) == 8 + len(kinds) + 1

def test_grey_images_of_a_data_set_share_a_scale(folder):
    scene = np.random.default_rng(0).integers(500, 4000, (48, 48)).astype(np.uint16)
    def taken(peak):
        x = scene.copy(); x[0, 0] = peak; photo(folder/'train/a/z.png', x); photo(folder/'test/a/dark.png', scene//16)
        d = folder_data(folder, 48); return d.bits, d.train.images[4].mean(), d.test.images[2].mean()
    (a, x, dark), (b, y, darker) = taken(4095), taken(4096)
    assert (a, b) == (12, 13) and abs(x - scene.mean()/16) < 1 and abs(x/y - 2) < .02 and 7 < dark < 9 and darker < 4.5

@pytest.mark.parametrize('name', ['کتاب\u200cها', 'क्\u200dष', '👨\u200d👩\u200d👧', 'No\u00a0finding', 'Fahr\u00adrad',
                                  '10\u202fkm', ' a b '])
def test_class_names(name, folder):
    for split in ('train', 'test'): (folder/split/'a').rename(folder/split/name)
    assert folder_data(folder, 32).classes == sorted([name, 'b'])

def test_no_place_for_a_cache(folder, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(folder/'train/a/0.jpg'))
    with pytest.raises(OSError, match='XDG_CACHE_HOME'): folder_data(folder, 32)
    monkeypatch.delenv('XDG_CACHE_HOME'); monkeypatch.setattr('os.path.expanduser', lambda p: p)  # no home at all
    with pytest.raises(OSError, match='XDG_CACHE_HOME'): folder_data(folder, 32)

def test_a_failed_write_loses_nothing(tmp_path):
    with atomic_write(tmp_path/('ф'*127)) as new: new.write_text('ha')  # as long as a name can be
    (tmp_path/('ф'*127)).unlink()
    with pytest.raises(OSError), atomic_write(tmp_path/'note') as new: new.write_text('ha'); raise OSError('no space')
    assert not [*tmp_path.iterdir()]
    path = save_result(tmp_path, result, predictions); m = create_model('vit', **small); m.save_pretrained(tmp_path)
    def content(): return {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    before = content()
    with pytest.raises(OSError), atomic_write(path) as new: new.write_text('ha'); raise OSError('no space')
    bad = result | dict(rows=[row | dict(accuracy=np.nan)])
    with pytest.raises(ValueError): save_result(tmp_path, bad, predictions)
    with pytest.raises(TypeError): m.save_pretrained(tmp_path, config=dict(name=object()))
    more = predictions | dict(labels=np.arange(9))
    with pytest.raises(TypeError): save_result(tmp_path, result | dict(config=dict(a=object())), more)
    assert content() == before

def test_photographs_with_any_name(tmp_path):
    "The command itself, without a home, in a terminal that knows no Cyrillic; one photograph lies on its side"
    names = ['a.jpg', '$b$ $.jpg', 'ф'*120 + '.jpg', 'x'*251 + '.jpg', 'z.jpg']
    image = Image.fromarray((sample_photos(64)[1].movedim(0, -1)*255).byte().numpy())
    exif = Image.Exif(); exif[0x112] = 6
    for name in names[:-1]: image.save(tmp_path/name, format='PNG')
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path/'z.jpg', format='PNG', exif=exif)
    env = {k: v for k, v in os.environ.items() if k != 'XDG_CACHE_HOME'}
    env |= dict(HOME='/dev/null', PYTHONIOENCODING='ascii', MPLCONFIGDIR=matplotlib.get_cachedir())
    command = Path(sys.executable).with_name('sigma_predict'), *names, 'none.jpg', 'out', '--keep', '4', '--out', 'out'
    (tmp_path/'out').mkdir(); p = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    said = [line.split(': ', 1)[1][:17] for line in p.stdout.splitlines()]
    assert len({*said}) == 1 and len([*tmp_path.glob('out/*.kept.png')]) == len(said) == len(names), p.stdout
    assert p.returncode == 1 and 'none.jpg: No such file or directory\nout: Is a directory\n' in p.stderr

@pytest.mark.parametrize('args, said', [
    (dict(keep=-1), 'k: got -1'), (dict(top_p=2.), 'p: got 2'), (dict(keep=2, top_p=.5), 'keep, top_p: got both'),
    (dict(bits=7), 'bits: got 7'), (dict(model='mine'), "name: got 'mine'"), (dict(images=[]), 'images: got 0'),
    (dict(images=['a.png', 'a.jpg']), 'more than one file for a.kept.png'),
    (dict(images=['a.kept.png', 'a.png']), 'more than one file for a.kept.png'),
    (dict(model='bare'), 'model: got one without a head'), (dict(model='fft'), 'model: got fft'),
    (dict(out='a.jpg'), 'a.jpg')])
def test_sigma_predict_says_what_is_wrong(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); photo(tmp_path/'a.jpg'); before = {*tmp_path.iterdir()}
    if args.get('model') == 'bare': create_model('vit', num_classes=0, **small).save_pretrained('bare')
    if args.get('model') == 'fft': create_model('fft', **small).save_pretrained('fft')
    args = dict(images=['a.jpg']) | args
    with pytest.raises(SystemExit) as e: sigma_predict(*args.pop('images'), **args)
    assert said in e.value.code and '\n' not in e.value.code and not capsys.readouterr().out
    assert {*tmp_path.iterdir()} - before <= {tmp_path/'bare', tmp_path/'fft'}
