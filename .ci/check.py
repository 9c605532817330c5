"""Do the tables, the results pages, README.md, the links and the modules agree with what they are made from?

    python .ci/check.py           exit 1 and say what differs
    python .ci/check.py --write   write tables, charts, outputs of the results pages, smaller pictures and README.md instead
"""
import base64, io, json, os, re, sys, tempfile, warnings
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from PIL import Image
from sigma_tokenizer.repro.results import (load_predictions, load_results, metrics,
                                           result_path)
from sigma_tokenizer.repro.tables import write_summary
from sigma_tokenizer.repro.experiments import load_preset, plan, run_config

root, write, wrong = Path(__file__).resolve().parent.parent, '--write' in sys.argv, []

def check_rows(folder):
    "Each result is a run of its preset, of one data set and a commit; its rows are what its predictions give"
    name, _, epochs = re.fullmatch(r'(.+?)(_(\d+))?', folder.name).groups()  # small_long_20: 20 epochs
    preset, results = load_preset(name), load_results(folder); runs = plan(preset)
    for r in results:
        path = result_path(folder, r['run'], r['seed']); said = load_predictions(path)
        if (r['run'], r['seed']) not in runs: wrong.append(f'{path}: not a run of the preset {folder.name}')
        if r['config'] != run_config(preset, r['run'], epochs and int(epochs)): wrong.append(f'{path}: other settings')
        if not re.fullmatch('[0-9a-f]{40}', r['commit'] or ''): wrong.append(f'{path}: commit {r["commit"]}')
        if r['data']['fingerprint'] != results[0]['data']['fingerprint']: wrong.append(f'{path}: other data')
        for row, preds, lengths in zip(r['rows'], said['preds'], said['lengths'], strict=True):
            if any(abs(row[k] - v) > 1e-12 for k, v in metrics(said['labels'], preds, lengths).items()):
                wrong.append(f'{path}: {row["row"]}: not what its predictions give')

def check_table(folder):
    "table.md and table.csv are what the results give"
    if write: write_summary(folder); return
    with tempfile.TemporaryDirectory() as tmp:
        for p in folder.glob('*-seed*.json'): (Path(tmp)/p.name).symlink_to(p)
        write_summary(tmp)
        for name in ('table.md', 'table.csv'):
            if (folder/name).read_text() != (Path(tmp)/name).read_text(): wrong.append(f'{folder/name}: not what the results give')

def texts(cell):
    "What a code cell prints and shows, as text"
    said = ''.join(o['text'] for o in cell.outputs if o.output_type == 'stream' and o.name == 'stdout')
    return [said, *(o.data.get('text/markdown', o.data.get('text/plain', '')) for o in cell.outputs if 'data' in o and 'image/png' not in o.data)]

def check_page(path):
    "The stored outputs of a results page are those of a run now"
    nb = nbformat.read(path, 4); now = nbformat.from_dict(nb)
    stored = [(c.source, texts(c)) for c in nb.cells if c.cell_type == 'code']
    NotebookClient(now, timeout=600, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    for (source, was), cell in zip(stored, (c for c in now.cells if c.cell_type == 'code')):
        cell.outputs, cell.execution_count = [o for o in cell.outputs if o.get('name') != 'stderr'], None
        if texts(cell) != was and not write: wrong.append(f'{path.name}: a cell shows something else now: {source[:80]!r}')
    if write: nbformat.write(now, path)

def check_size(path):
    "A notebook stays under 300 KiB; `--write` stores large pictures in 128 colours"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for data in (o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', [])):
        if not write or len(png := ''.join(data.get('image/png', ''))) < 50*1024: continue
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        if image.mode == 'P': continue
        image.convert('RGB').quantize(128).save(small := io.BytesIO(), 'png', optimize=True)
        data['image/png'] = base64.b64encode(small.getvalue()).decode()
    if write: path.write_text(json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')
    if (size := path.stat().st_size) > 300*1024: wrong.append(f'{path.name}: {size//1024} KiB')

def readme():
    "index.ipynb with its outputs, and links that work from the top folder; its pictures as files, by name"
    pictures = {}
    def text(cell):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown': return source
        parts = [] if source.startswith('#|') else [f'```python\n{source}\n```']
        for data in (o.get('data', {}) for o in cell['outputs']):
            if 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
            elif 'image/png' in data:
                pictures[name := f'nbs/index-{len(pictures) + 1}.png'] = base64.b64decode(data['image/png'])
                parts.append('![{}]({})'.format(re.search(r'#\| fig-alt: "(.*)"', source)[1], name))
            elif 'text/plain' in data: parts.append('```\n' + ''.join(data['text/plain']) + '\n```')
        return '\n\n'.join(parts)
    cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    said = '\n\n'.join(filter(None, map(text, cells))).replace('](../', '](')
    return re.sub(r'\]\((\w+\.ipynb)', r'](nbs/\1', said) + '\n', pictures

def check_links():
    "The sidebar names each notebook once, links lead to files, and each module has its notebook"
    names = re.findall(r'- (\w+\.ipynb)$', (root/'_quarto.yml').read_text(), re.M)
    if sorted(names) != sorted(p.name for p in (root/'nbs').glob('*.ipynb')): wrong.append('_quarto.yml: the sidebar and nbs/ differ')
    pages = {p: '\n'.join(''.join(c['source']) for c in json.loads(p.read_text())['cells'] if c['cell_type'] == 'markdown')
             for p in (root/'nbs').glob('*.ipynb')} | {p: p.read_text(encoding='utf-8') for p in [*root.glob('*.md'), root/'results/README.md']}
    for p, said in pages.items():
        for to in re.findall(r'\]\((?!\w+:|#)([^)#\s]+)', said):
            if not (p.parent/to).exists(): wrong.append(f'{p.name}: {to}: no such file')
        for name in re.findall(r'`(\d\d_\w+)`', said):
            if not (root/f'nbs/{name}.ipynb').exists(): wrong.append(f'{p.name}: `{name}`: no such notebook')
    for p in (root/'sigma_tokenizer').glob('*.py'):
        made = re.search(r'^# AUTOGENERATED! .*: \.\./(nbs/\w+\.ipynb)', p.read_text(), re.M)
        if p.name not in ('__init__.py', '_modidx.py') and not (made and (root/made[1]).exists()): wrong.append(f'{p.name}: no notebook exports it')

os.environ['PYTHONWARNINGS'] = 'ignore'; warnings.simplefilter('ignore')
for folder in sorted({p.parent for p in (root/'results').rglob('*-seed*.json')}):
    if folder.parent.name != 'choices': check_rows(folder)  # the choices were made on held-out images, some without predictions
    check_table(folder)
for page in [*sorted((root/'nbs').glob('2*.ipynb')), root/'nbs/index.ipynb']: check_page(page)
for path in (root/'nbs').glob('*.ipynb'): check_size(path)
said, pictures = readme()
for name, data in {'README.md': said.encode(), **pictures}.items():
    if write: (root/name).write_bytes(data)
    elif not (root/name).exists() or (root/name).read_bytes() != data: wrong.append(f'{name}: not what nbs/index.ipynb gives')
check_links()
print('\n'.join(wrong) or 'tables, pages, README and links ' + ('written' if write else 'agree with what they are made from'))
sys.exit(bool(wrong))
