"Everything is set in settings.ini; this file only hands it to setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
c = config['DEFAULT']
many = lambda key: c.get(key, '').split()
setup(
    name=c['lib_name'], version=c['version'], description=c['description'],
    keywords=c['keywords'], author=c['author'], license='Apache-2.0',
    packages=find_packages(include=[c['lib_path'], c['lib_path'] + '.*']),
    package_data={c['lib_path']:['py.typed', 'weights/*.safetensors']}, zip_safe=False,
    python_requires='>=' + c['min_python'],
    install_requires=many('requirements'),
    extras_require=dict(dev=many('dev_requirements'),
                        weights=many('weights_requirements'),
                        distributed=many('distributed_requirements')),
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=['Programming Language :: Python :: 3',
                 'Programming Language :: Python :: 3.11',
                 'Programming Language :: Python :: 3.12'],
    entry_points=dict(console_scripts=many('console_scripts'),
                      nbdev=[f"{c['lib_path']}={c['lib_path']}._modidx:d"]))
