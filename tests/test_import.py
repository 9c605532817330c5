"`import sigma_tokenizer` is light, needs no timm, and the tests run on the versions that users get"
import os, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path
from packaging.requirements import Requirement
from packaging.version import Version

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
    heavy = ('pandas', 'matplotlib', 'timm', 'fastai', 'torchvision', 'sklearn', 'scipy', 'torch._dynamo')
    for _ in range(3):  # other programs may disturb one
        ratio, *modules = python(code, cwd=tmp_path).split()
        assert not [m for m in modules if m in heavy]
        if float(ratio) < 1.25: break
    else: assert False, ratio

def test_an_old_timm_does_no_harm(tmp_path):
    (tmp_path/'timm').mkdir(); (tmp_path/'timm/__init__.py').write_text('__version__ = "0.6.0"')
    (tmp_path/'timm/models.py').write_text('')
    code = '''from sigma_tokenizer import create_model; import torch, timm
assert timm.__version__ == "0.6.0"
model = create_model("msvd_gated", image_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2).eval()
print(model(torch.rand(1, 3, 32, 32)).shape)
import sigma_tokenizer.budget  # works without it'''
    assert python(code, tmp_path, cwd=tmp_path).strip() == 'torch.Size([1, 6])'

def test_no_module_of_unix_is_needed(tmp_path):
    code = '''import sys, importlib, pkgutil
unix = 'resource', 'fcntl', 'pwd', 'grp', 'termios', 'readline', 'syslog'
for name in unix: sys.modules[name] = None  # as on Windows
import sigma_tokenizer
for m in pkgutil.walk_packages(sigma_tokenizer.__path__, 'sigma_tokenizer.'): importlib.import_module(m.name)'''
    python(code, cwd=tmp_path)

def test_users_and_tests_have_the_same_versions():
    ini = ConfigParser(delimiters=['=']); ini.read(Path(__file__).parents[1]/'settings.ini', encoding='utf-8')
    users, ours = ({r.name: r.specifier for r in map(Requirement, ini['DEFAULT'][k].split())}
                   for k in ('requirements', 'dev_requirements'))
    for name in {*users} & {*ours}: assert {s.operator for s in ours[name]} <= {'>='}, name  # no pin below the newest
    for name, least in dict(fastai='2.8.9', fastcore='2', nbdev='3').items():
        assert Version(version(name)) >= Version(least)
