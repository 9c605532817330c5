"""Do the tables, the results pages, README.md, the links and the modules agree with what they are made from?

    python .ci/check.py           exit 1 and say what differs
    python .ci/check.py --write   write tables, charts, outputs of results pages, smaller pictures and README.md instead
"""
import base64, io, json, os, re, sys, warnings
from concurrent.futures import ProcessPoolExecutor
from configparser import ConfigParser
from itertools import chain
from pathlib import Path
import nbformat
from nbclient import NotebookClient
from PIL import Image
import sigma_tokenizer
from sigma_tokenizer.repro.experiments import load_experiments, load_preset, plan, run_config
from sigma_tokenizer.repro.results import (load_predictions, load_results, metrics, result_path, result_table,
                                            table_lines, write_summary)

root, write = Path(__file__).resolve().parent.parent, '--write' in sys.argv
notebooks = sorted((root/'nbs').glob('*.ipynb'))
cells = lambda path: json.loads(path.read_text(encoding='utf-8'))['cells']

def check_rows(folder):
    "Each result is a run of its preset, of one data set and a commit; its rows are what its predictions give"
    name, _, epochs = re.fullmatch(r'(.+?)(_(\d+))?', folder.name).groups()  # small_long_20: 20 epochs
    preset, results = load_preset(name), load_results(folder); runs = plan(preset)
    for r in results:
        path = result_path(folder, r['run'], r['seed']); predicted = load_predictions(path)
        # a run that has left the package is named, with its commit
        gone = r['run'] not in load_experiments() and f'`{r["run"]}`' in (root/'results/README.md').read_text('utf-8')
        if not gone and (r['run'], r['seed']) not in runs: yield f'{path}: not a run of the preset {folder.name}'; continue
        if not gone and r['config'] != run_config(preset, r['run'], epochs and int(epochs)): yield f'{path}: other settings'
        if not re.fullmatch('[0-9a-f]{40}', r['commit'] or ''): yield f'{path}: commit {r["commit"]}'
        if r['data']['fingerprint'] != results[0]['data']['fingerprint']: yield f'{path}: other data'
        for row, preds, lengths in zip(r['rows'], predicted['preds'], predicted['lengths'], strict=True):
            if any(abs(row[k] - v) > 1e-12 for k, v in metrics(predicted['labels'], preds, lengths).items()):
                yield f'{path}: {row["row"]}: not what its predictions give'

def check_table(folder):
    "table.md and table.csv are what the results give"
    if write: write_summary(folder); return
    table = result_table(load_results(folder))
    for name, text in {'table.md': '\n'.join(table_lines(table)) + '\n',
                       'table.csv': table.to_csv(index=False, float_format='%.6g')}.items():
        if (folder/name).read_text(encoding='utf-8') != text: yield f'{folder/name}: not what the results give'

def texts(cell):
    "What a code cell prints and shows, as text"
    printed = ''.join(o['text'] for o in cell.outputs if o.output_type == 'stream' and o.name == 'stdout')
    shown = [o.data for o in cell.outputs if 'data' in o and 'image/png' not in o.data]
    return [printed, *(data.get('text/markdown', data.get('text/plain', '')) for data in shown)]

def check_page(path):
    "The stored outputs of a results page are those of a run now; in a process of its own"
    nb = nbformat.read(path, 4); now, wrong = nbformat.from_dict(nb), []
    stored = [(c.source, texts(c)) for c in nb.cells if c.cell_type == 'code']
    where = dict(metadata=dict(path=str(path.parent)))
    NotebookClient(now, timeout=600, record_timing=False, coalesce_streams=True, resources=where).execute()
    for (source, was), cell in zip(stored, (c for c in now.cells if c.cell_type == 'code')):
        cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']; cell.execution_count = None
        for o in cell.outputs: o.pop('execution_count', None)
        if texts(cell) != was and not write: wrong.append(f'{path.name}: a cell shows something else: {source[:80]!r}')
    if write: nbformat.write(now, path)
    return wrong

def check_size(path):
    "A notebook stays under 300 KiB; `--write` stores large pictures in 128 colours"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for data in (o.get('data', {}) for c in nb['cells'] for o in c.get('outputs', [])):
        if not write or len(png := ''.join(data.get('image/png', ''))) < 50*1024: continue
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        if image.mode == 'P': continue
        image.convert('RGB').quantize(128).save(small := io.BytesIO(), 'png', optimize=True)
        data['image/png'] = base64.b64encode(small.getvalue()).decode()
    text = json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
    if write: path.write_text(text, encoding='utf-8')
    if (size := path.stat().st_size) > 300*1024: yield f'{path.name}: {size//1024} KiB'

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
    page = '\n\n'.join(filter(None, map(text, cells(root/'nbs/index.ipynb')))).replace('](../', '](')
    return {'README.md': (re.sub(r'\]\((\w+\.ipynb)', r'](nbs/\1', page) + '\n').encode(), **pictures}

def check_readme():
    for name, content in readme().items():
        if write: (root/name).write_bytes(content)
        elif not (root/name).exists() or (root/name).read_bytes() != content:
            yield f'{name}: not what nbs/index.ipynb gives'

def check_links():
    "The sidebar names each notebook once, and links lead to files"
    names = re.findall(r'- (\w+\.ipynb)$', (root/'_quarto.yml').read_text(), re.M)
    if sorted(names) != [p.name for p in notebooks]: yield '_quarto.yml: the sidebar and nbs/ differ'
    pages = {p: '\n'.join(''.join(c['source']) for c in cells(p) if c['cell_type'] == 'markdown') for p in notebooks}
    for p, text in pages.items():  # nbdev would link the code once more
        for link in re.findall(r'\[[^\]`]*`[^`]+`[^\]`]*\]\([^)]*\)', text):
            yield f'{p.name}: {link}: code in the text of a link'
    for p in [*root.glob('*.md'), root/'results/README.md']: pages[p] = p.read_text(encoding='utf-8')
    for p, text in pages.items():
        for to in re.findall(r'\]\((?!\w+:|#)([^)#\s]+)', text):
            if not (p.parent/to).exists(): yield f'{p.name}: {to}: no such file'
        for name in re.findall(r'`(\d\d_\w+)`', text):
            if not (root/f'nbs/{name}.ipynb').exists(): yield f'{p.name}: `{name}`: no such notebook'

def check_modules():
    "Each module has its notebook, and there is one version"
    for p in (root/'sigma_tokenizer').rglob('*.py'):
        made = re.search(r'^# AUTOGENERATED! .* File to edit: (\S+)', p.read_text(encoding='utf-8'), re.M)
        if p.name not in ('__init__.py', '_modidx.py') and not (made and (p.parent/made[1].rstrip('.')).exists()):
            yield f'{p.name}: no notebook exports it'
    (settings := ConfigParser()).read(root/'settings.ini')
    if (version := settings['DEFAULT']['version']) != sigma_tokenizer.__version__:
        yield f'settings.ini: version {version}, the package says {sigma_tokenizer.__version__}'

def main():
    os.environ['PYTHONWARNINGS'] = 'ignore'; warnings.simplefilter('ignore')
    folders = sorted({p.parent for p in (root/'results').rglob('*-seed*.json')})
    pages = [p for p in notebooks if p.name[0] == '3'] + [root/'nbs/index.ipynb']
    with ProcessPoolExecutor(2) as pool:  # pages, while this process reads results
        shown = pool.map(check_page, pages)
        # the choices were made on held-out images, some without predictions
        rows = [w for f in folders if f.parent.name != 'choices' for w in check_rows(f)]
        wrong = [*rows, *chain(*map(check_table, folders)), *chain(*shown)]
    wrong += [*chain(*map(check_size, notebooks)), *check_readme(), *check_links(), *check_modules()]
    done = 'written' if write else 'agree with what they are made from'
    print('\n'.join(wrong) or f'tables, pages, README and links {done}')
    sys.exit(bool(wrong))

if __name__ == '__main__': main()
