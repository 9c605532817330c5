"""Does everything that the site and the front pages point at exist, and does the Russian summary hold the README's numbers?

    python .ci/site.py     a second, needs no Quarto; exit 1 and say what is wrong

Sidebar and nbs/ name the same notebooks. Links in the notebooks and in *.md lead to files and headings that exist, and `05_fft` in a notebook to that notebook. A notebook begins with a cell of title and
subtitle and nothing else, since nbdev leaves out what else it holds. Below each picture stands its caption, in italics. No output is a warning or names a path of one machine. The repository's address is that of settings.ini everywhere.
"""
import configparser, json, re, sys, tempfile
from pathlib import Path

root, wrong, pictures = Path(__file__).resolve().parent.parent, [], re.compile('image/(png|jpeg|svg)')
here = re.compile('ipykernel_|' + '|'.join(re.escape(f'{p}/') for p in (root.parent, Path.home(), tempfile.gettempdir())))  # paths of this machine
ini = configparser.ConfigParser(delimiters=['=']); ini.read(root/'settings.ini', encoding='utf-8'); repo = ini['DEFAULT']['git_url']
books = {p.stem: [(c, ''.join(c['source'])) for c in json.loads(p.read_text(encoding='utf-8'))['cells']] for p in sorted((root/'nbs').glob('*.ipynb'))}
read = lambda name: (root/name).read_text(encoding='utf-8')
def say(place, what): wrong.append(f'{place}: {what}')
def prose(text): return re.sub(r'`[^`\n]*`', '', re.sub(r'^(`{3,}|~{3,})[^\n]*\n.*?^\1', '', text, flags=re.M | re.S))
def caption(cell, text): return cell['cell_type'] == 'markdown' and re.match(r'\*(?![*\s])', text)
def anchors(text): return {re.sub(r'[^\w -]', '', h.lower()).strip().replace(' ', '-') for h in re.findall(r'^#+ +(.*)$', text, re.M)} | set(re.findall(r'id="([^"]+)"', text))

listed = re.findall(r'^\s*- (?:file: |href: )?(\S+\.(?:ipynb|qmd|md))\s*$', read('_quarto.yml'), re.M)
for name in {*listed, *(f'{b}.ipynb' for b in books)}:
    if listed.count(name) != 1 or Path(name).stem not in books: say('_quarto.yml', f'{name}: in the sidebar {listed.count(name)} times, ' + ('in nbs/' if Path(name).stem in books else 'not in nbs/'))

def check_links(path, text, label):
    "Targets of links, pictures and HTML of one text"
    for target in re.findall(r'\]\(<?([^)>\s]+)>?(?: "[^"]*")?\)', prose(text)) + re.findall(r'(?:src|href)="([^"]+)"', prose(text)) + re.findall(r'^\[[^\]]+\]: +(\S+)', prose(text), re.M):
        if re.match('[a-z]+:', target): continue
        name, _, anchor = target.partition('#')
        to = (path.parent/name).resolve() if name else path
        if not to.exists() or root not in (to, *to.parents): say(label, f'{target}: no such file'); continue
        if anchor and to.suffix == '.ipynb': said = '\n'.join(s for c, s in books[to.stem] if c['cell_type'] == 'markdown')
        elif anchor: said = to.read_text(encoding='utf-8')
        if anchor and anchor.lower() not in anchors(said): say(label, f'{target}: no such heading')

for name in ('README.md', 'README.ru.md', 'CHANGELOG.md', 'CONTRIBUTING.md', 'results/README.md'): check_links(root/name, read(name), name)
for book, cells in books.items():
    path = root/f'nbs/{book}.ipynb'
    head = [line for line in cells[0][1].splitlines() if line.strip()]
    if cells[0][0]['cell_type'] == 'markdown' and not (len(head) <= 2 and head[0].startswith('# ') and all(line.startswith('>') for line in head[1:])): say(path.name, 'the first cell holds more than title and subtitle')
    for i, (cell, text) in enumerate(cells):
        near = [cells[j] for j in (i + 1, i - 1) if 0 <= j < len(cells)]
        if cell['cell_type'] == 'markdown':
            check_links(path, text, path.name)
            for name in re.findall(r'`(\d\d_\w+)`', text):
                if name not in books: say(path.name, f'`{name}`: no such notebook')
            for name in re.findall(r'\]\(\.\./(results/[^)\s]+\.png)\)', text):  # nbs/links.lua leads to its name beside the pages
                if (root/'nbs'/Path(name).name).resolve() != root/name: say(path.name, f'{name}: nbs/{Path(name).name} is no link to it')
        elif any(o.get('name') == 'stderr' or here.search(json.dumps(o.get('text', ''))) for o in cell['outputs']): say(path.name, f'a warning, or a path of one machine, is stored: {text.splitlines()[0][:90]!r}')
        elif any(pictures.match(k) for o in cell['outputs'] for k in o.get('data', {})) and not any(caption(*c) for c in near):
            say(path.name, f'a picture without a caption: {text.splitlines()[-1][:90]!r}')

known = set(re.findall(r'\d+\.\d+(?: ± \d+\.\d+)?', read('README.md')))
for number in re.findall(r'\d+[.,]\d+(?: ± \d+[.,]\d+)?', '\n'.join(line for line in read('README.ru.md').splitlines() if line.startswith('|'))):
    if number not in known: say('README.ru.md', f'{number}: not in README.md')
for name in ('_quarto.yml', 'nbs/links.lua', 'CITATION.cff', 'README.ru.md', 'CHANGELOG.md', 'CONTRIBUTING.md'):
    for url in re.findall(r'https://github\.com/[\w.-]+/[\w.-]+', read(name)):
        if url.removesuffix('.git') != repo: say(name, f'{url}: settings.ini has {repo}')
print('\n'.join(wrong) or f'the sidebar, links and captions of {len(books)} notebooks lead somewhere')
sys.exit(bool(wrong))
