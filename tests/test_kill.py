"`sigma_reproduce`, killed at any moment and started again, ends with the rows of a run that was never killed"
import os, random, re, subprocess, sys, time
from contextlib import nullcontext, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
import pytest, torch
from sigma_tokenizer import SigmaModel
from sigma_tokenizer.data import digits_data, image_loaders
from sigma_tokenizer.evaluation import evaluate
from sigma_tokenizer.repro.folders import hold_out
from sigma_tokenizer.repro.results import load_predictions, load_results, result_path
from sigma_tokenizer.repro.runs import reproduce

pytestmark = pytest.mark.xdist_group('kill')  # one process makes the fixtures

kills = int(os.environ.get('KILLS', 1))
tiny = '''data = "digits"
runs = ["msvd_short", "svd_p90"]
seeds = [1]
repeat = {runs = [], seeds = []}
model = {image_size = 16, patch_size = 2, embed_dim = 16, depth = 1, num_heads = 2}

[train]
epochs = 3
batch_size = 256
lr = 3e-3
wd = 0.01
schedule = "one_cycle"
precision = "float32"
compile = false
'''
command = [Path(sys.executable).with_name('sigma_reproduce'), '--device', 'cpu']

def timeless(r):
    return {k: [*map(timeless, v)] if k == 'epochs' else v for k, v in r.items()
            if k not in ('seconds', 'device', 'commit')}

def content(out):
    "Results without times, predictions, and the table"
    predictions = {r['run']: load_predictions(result_path(out, r['run'], 1)) for r in load_results(out)}
    return [[*map(timeless, load_results(out))], (out/'table.md').read_text(),
            {run: {k: v.tolist() for k, v in p.items()} for run, p in predictions.items()}]

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('runs'); (home/'tiny.toml').write_text(tiny)
    return home

def quietly(home, out, **kw):
    "What `reproduce` gives and prints in this process"
    with redirect_stdout(StringIO()) as printed:
        table = reproduce(str(home/'tiny.toml'), device='cpu', out=str(home/out), **kw)
    return table, printed.getvalue()

@pytest.fixture(scope='module')
def whole(home):
    "The content of a run that was never killed, with one thread, and what it printed"
    torch.set_num_threads(1); printed = quietly(home, 'whole')[1]
    return content(home/'whole'), printed

def started(home, out):
    return subprocess.Popen([*command, '--preset', home/'tiny.toml', '--out', out],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONIOENCODING='cp1252'))

def killed(home):
    "Kill it some times, each after a random number of checkpoints and a random delay; (folder, exit code, output)"
    draw, left, i = random.Random(1), kills, 0
    while left or not i:
        out, done, i, printed = home/f'итоги-{i}', False, i + 1, b''  # no name for a western terminal
        while not done:
            p = started(home, out)
            seen, more = set(), draw.randint(1, 3) if left else 99
            def look():
                with suppress(OSError): seen.update((f.name, f.stat().st_mtime_ns) for f in out.glob('*-seed*.[cj]*'))
            look(); before = len(seen)
            while p.poll() is None and not ([*out.glob('*.lock')] and len(seen) - before >= more):
                time.sleep(.005); look()
            if p.poll() is None: time.sleep(draw.uniform(0, .3))
            done = p.poll() is not None
            if not done: p.kill(); left -= 1
            printed += p.communicate(timeout=60)[0]  # ends when nothing is left that could write
        yield out, p.returncode, printed

def test_killed_and_started_again(home, whole):
    for out, code, printed in killed(home):
        assert code == 0 and b'2 of 2 runs done' in printed and b'\r' not in printed, printed.decode()
        assert b'a chart are in' in printed and b'\\u0438\\u0442\\u043e\\u0433\\u0438' in printed
        assert content(out) == whole[0]
        names = {p.name for p in out.iterdir()}
        assert names == {'.lock', 'table.md', 'table.csv', 'tokens_vs_accuracy.png',
                         *(f'{run}-seed1.{e}' for run in ('msvd_short', 'svd_p90') for e in ('json', 'npz'))}

def test_output(whole, home):
    (_, table, _), printed = whole
    epochs = [l for l in printed.splitlines() if 'epoch' in l]
    form = r'epoch [123] of 3: loss \d\.\d+, accuracy 0\.\d+, \d+\.\d s'
    assert len(epochs) == 6 and all(re.fullmatch(form, l) for l in epochs)
    assert '\r' not in printed and 'reported' not in table.lower()
    rows = [(r['run'], row['budget']) for r in load_results(home/'whole') for row in r['rows']]
    assert len({*rows}) == len(rows) == 15 and ('msvd_short', '1 + rest') in rows

def test_nothing_is_done_twice(whole, home):
    assert '2 runs, 0 to do' in quietly(home, 'whole')[1]
    for kw in (dict(epochs=2), dict(holdout=.2)):
        with pytest.raises(ValueError, match='holds a run with other settings'): quietly(home, 'whole', **kw)
    assert content(home/'whole') == whole[0]

@pytest.mark.parametrize('module', ['checkpoint', 'repro.results'])
def test_the_disk_is_full(home, whole, monkeypatch, module):
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match='failed: .*No space left on device'):
        m.setattr(f'sigma_tokenizer.{module}.atomic_write', lambda path: nullcontext(Path('/dev/full')))
        quietly(home, f'full {module}')
    printed = quietly(home, f'full {module}')[1]
    assert content(home/f'full {module}') == whole[0]
    if module == 'repro.results': assert 'epoch' not in printed  # trained already

def test_a_run_that_fails_does_not_stop_the_others(home):
    (home/'broken').mkdir(); (home/'broken/msvd_short-seed1.ckpt').write_text('no checkpoint')
    with pytest.raises(RuntimeError, match='msvd_short, seed 1 failed: .*no checkpoint'):
        quietly(home, 'broken', epochs=1)
    assert result_path(home/'broken', 'svd_p90', 1).exists()

@pytest.mark.slow
def test_two_processes_share_the_runs(home, whole):
    two = [started(home, home/'shared') for _ in range(2)]
    printed = b''.join(p.communicate(timeout=300)[0] for p in two)
    assert not any(p.returncode for p in two) and content(home/'shared') == whole[0], printed.decode()
    assert printed.count(b'epoch 3 of 3') == 2 and b'2 of 2 runs done' in printed

def test_holdout_and_weights(home):
    quietly(home, 'held', holdout=.2, weights=True, methods=['svd'], epochs=1)
    [r] = load_results(home/'held')
    assert (r['data']['evaluated'], r['data']['train'], r['data']['test']) == ('holdout', 1149, 288)
    m = SigmaModel.from_pretrained(home/'held/svd_p90-seed1'); assert m.classes == [*'0123456789']
    preds = evaluate(m, image_loaders(hold_out(digits_data(16), .2), 256).valid)[0]['preds']
    assert (preds == load_predictions(result_path(home/'held', 'svd_p90', 1))['preds']).all()
