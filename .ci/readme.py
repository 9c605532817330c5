"""Write README.md from nbs/index.ipynb, with its stored outputs and with links that work from the top folder.

    python .ci/readme.py           write README.md
    python .ci/readme.py --check   exit 1 if README.md is not what would be written
"""
import json, sys
from pathlib import Path

root = Path(__file__).parent.parent

def cell_text(cell):
    source = ''.join(cell['source'])
    if cell['cell_type'] == 'markdown': return source
    parts = [] if source.startswith('#|') else [f'```python\n{source}\n```']
    for out in cell['outputs']:
        data = out.get('data', {})
        if 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
        elif 'text/plain' in data: parts.append('```\n' + ''.join(data['text/plain']) + '\n```')
    return '\n\n'.join(parts)

cells = json.loads((root/'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
text = '\n\n'.join(cell_text(c) for c in cells).replace('](../', '](')
for notebook in (root/'nbs').glob('*.ipynb'): text = text.replace(f']({notebook.name})', f'](nbs/{notebook.name})')
text += '\n'
if '--check' in sys.argv:
    if (root/'README.md').read_text(encoding='utf-8') != text: sys.exit('README.md differs from nbs/index.ipynb: run python .ci/readme.py')
else: (root/'README.md').write_text(text, encoding='utf-8')
