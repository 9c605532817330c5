"`import sigma_tokenizer` is light, and needs neither timm nor the Hugging Face Hub"
import os, subprocess, sys
import pytest

def python(code, *path, **kw):
    "What a fresh process prints"
    path = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get('PYTHONPATH')])])
    env = os.environ | dict(PYTHONPATH=path)
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, **kw)
    assert not done.returncode, done.stderr
    return done.stdout

def test_the_package_adds_little_to_torch(tmp_path):
    code = '''import sys, time
start = time.perf_counter(); import torch; between, there = time.perf_counter(), set(sys.modules)
import sigma_tokenizer; end = time.perf_counter()
print((end - start)/(between - start), *(set(sys.modules) - there))'''
    said = [python(code, cwd=tmp_path).split() for _ in range(3)]
    heavy = ('pandas', 'matplotlib', 'timm', 'fastai', 'torchvision', 'sklearn', 'scipy', 'torch._dynamo')
    assert not [m for m in said[0][1:] if m in heavy]
    assert min(float(ratio) for ratio, *_ in said) < 1.25

@pytest.mark.parametrize('stub, needs', [('huggingface_hub', 'model.save_pretrained("here")'),
                                         ('timm', 'import sigma_tokenizer.timm_models'), ('timm', 'import sigma_tokenizer.budget')])
def test_an_old_library_is_asked_for_only_when_needed(stub, needs, tmp_path):
    (tmp_path/stub).mkdir(); (tmp_path/stub/'__init__.py').write_text('__version__ = "0.6.0"')
    (tmp_path/stub/'models.py').write_text('')
    code = f'''from sigma_tokenizer import create_model; import torch, {stub}
assert {stub}.__version__ == "0.6.0"
model = create_model("msvd_gated", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()
print(model(torch.rand(1, 3, 32, 32)).shape)
try: {needs}
except ImportError as e: print(e)'''
    shape, said = python(code, tmp_path, cwd=tmp_path).splitlines()
    assert shape == 'torch.Size([1, 6])' and f'needs {stub}>=' in said.replace('saving and loading models ', '')

def test_no_module_of_unix_is_needed(tmp_path):
    code = '''import sys, importlib, pkgutil
for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios', 'readline', 'syslog'): sys.modules[name] = None  # as on Windows
import sigma_tokenizer
for m in pkgutil.iter_modules(sigma_tokenizer.__path__): importlib.import_module(f'sigma_tokenizer.{m.name}')'''
    python(code, cwd=tmp_path)
