"""Recompute every table and figure from the files in results/, and fail if a committed table differs.

    python .ci/tables.py           exit 1 and say what differs
    python .ci/tables.py --write   write tables, pictures and the notebooks' outputs instead (then: nbdev_clean, python .ci/readme.py)

A row's figures are computed from the kept predictions, the tables from the rows, and the experiment notebooks (20 to 29, and index) are executed. Pictures are drawn again but not compared: their
bytes depend on fonts.
"""
import os, re, sys, tempfile, warnings
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from sigma_tokenizer.results import load_predictions, load_results, metrics, result_path, write_summary
from sigma_tokenizer.runs import load_preset, plan

root, write, wrong = Path(__file__).parent.parent, '--write' in sys.argv, []

def check_rows(folder):
    "Every result is one of its preset, of one data set and a committed state; its rows are what the predictions beside it give"
    results, runs = load_results(folder), plan(load_preset(folder.name))
    for r in results:
        path = result_path(folder, r['run'], r['seed'])
        if (r['run'], r['seed']) not in runs: wrong.append(f'{path}: not a run of the preset {folder.name}')
        if not re.fullmatch('[0-9a-f]{40}', r['commit'] or ''): wrong.append(f'{path}: commit {r["commit"]}')
        if r['data']['fingerprint'] != results[0]['data']['fingerprint']: wrong.append(f'{path}: other data')
        kept = load_predictions(path)
        for row, preds, lengths in zip(r['rows'], kept['preds'], kept['lengths'], strict=True):
            now = metrics(kept['labels'], preds, lengths)
            if any(abs(row[k] - v) > 1e-12 for k, v in now.items()): wrong.append(f'{path}: {row["row"]} holds {row}, its predictions give {now}')

def check_tables(folder):
    "table.md and table.csv against the results"
    results = load_results(folder)
    title = f'ours ({results[0]["data"]["name"]}, {results[0]["config"]["model"]["image_size"]} pixels)'
    if write: write_summary(folder, title); return
    with tempfile.TemporaryDirectory() as tmp:
        for p in folder.glob('*-seed*.json'): (Path(tmp)/p.name).symlink_to(p.resolve())
        write_summary(tmp, title)
        for name in ('table.md', 'table.csv'):
            if not (folder/name).exists() or (folder/name).read_text() != (Path(tmp)/name).read_text(): wrong.append(f'{folder/name} is not what the results give')

def texts(cell):
    "What a code cell printed and showed, as text"
    said = ''.join(o['text'] for o in cell.outputs if o.output_type == 'stream' and o.name == 'stdout')
    shown = [o.data.get('text/markdown', o.data.get('text/plain', '')) for o in cell.outputs if 'data' in o and 'image/png' not in o.data]
    return [said, *shown], sum('image/png' in o.get('data', {}) for o in cell.outputs)

def check_notebook(path):
    "Stored outputs against those of a run now; cells flagged slow are left out, as in the tests"
    nb = nbformat.read(path, 4)
    code = [c for c in nb.cells if c.cell_type == 'code' and not c.source.startswith('#| slow')]
    stored = [texts(c) for c in code]
    now = nbformat.from_dict(nb | {'cells': [c for c in nb.cells if not c.source.startswith('#| slow')]})
    NotebookClient(now, timeout=600, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    fresh = [c for c in now.cells if c.cell_type == 'code']
    if write:
        for c, f in zip(code, fresh): c.outputs, c.execution_count = [o for o in f.outputs if o.get('name') != 'stderr'], None
        nbformat.write(nb, path)
    for c, f, was in zip(code, fresh, stored):
        if not write and texts(f) != was: wrong.append(f'{path.name}: a cell shows other text or pictures now: {c.source[:100]!r}')

os.environ['PYTHONWARNINGS'] = 'ignore'; warnings.simplefilter('ignore')
folders = sorted({p.parent for p in (root/'results').rglob('*-seed*.json')})
for folder in folders:
    if folder.parent.name != 'choices': check_rows(folder)  # the choices kept no predictions
    check_tables(folder)
notebooks = [*sorted((root/'nbs').glob('2*.ipynb')), root/'nbs/index.ipynb']
for path in notebooks: check_notebook(path)
print('\n'.join(wrong) or f'{len(folders)} folders of results and {len(notebooks)} notebooks {"written" if write else "hold what the results give"}')
sys.exit(bool(wrong))
