"Packaging: description and addresses are in pyproject.toml, everything else in settings.ini"
import re, tomllib
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
repository = tomllib.loads((here/'pyproject.toml').read_text(encoding='utf-8'))['project']['urls']['Repository']

def readme():
    "README.md with links that also work away from the repository"
    def absolute(m): return f"{m[1]}({repository}/{'raw' if m[1].startswith('!') else 'blob'}/{cfg['branch']}/{m[2]})"
    return re.sub(r'(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)', absolute, (here/'README.md').read_text(encoding='utf-8'))

setup(
    version=cfg['version'], keywords=cfg['keywords'], author=cfg['author'], author_email=cfg['author_email'], license='Apache-2.0',
    long_description=readme(), long_description_content_type='text/markdown',
    classifiers=['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research',
                 'Topic :: Scientific/Engineering :: Image Recognition',
                 *(f'Programming Language :: Python :: {v}' for v in ('3', '3.11', '3.12', '3.13'))],
    packages=find_packages(include=[cfg['lib_name'] + '*']),
    package_data={cfg['lib_name']: ['weights/*/*', 'repro/*.toml', 'repro/presets/*.toml']},
    python_requires='>=' + cfg['min_python'],
    install_requires=cfg['requirements'].split(),
    extras_require={extra: cfg[f'{extra}_requirements'].split() for extra in ('dev', 'timm', 'transformers', 'export', 'kaggle')},
    entry_points={'console_scripts': cfg['console_scripts'].split(),
                  'nbdev': [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    zip_safe=False,
)
