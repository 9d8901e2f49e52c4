"Names of before 0.2, for one release: they work, and a warning says where each is now."
import importlib
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

MODULES = { # old module: where its names are now
    'association': ['ics.association'], 'memory': ['camera_memory'], 'ics.memory': ['camera_memory'],
    'quintuplet': ['ics.quintuplet'], 'ics_lab': ['ics.lab', 'ics.comparison'],
    'triplet_mining': ['crossdataset.triplet_mining'],
    'pul': ['crossdataset.progressive'], 'crossdataset_lab': ['crossdataset.lab'],
    'epipolar': ['mcssl.epipolar'], 'pseudolabels': ['mcssl.pseudolabels', 'mcssl.pairs'],
    'consistency': ['mcssl.consistency'], 'mcssl_lab': ['mcssl.lab'],
    'detectors': ['detection.detectors', 'detection.training'],
    'yolov3': ['detection.yolov3', 'detection.yolo_grids', 'detection.darknet'],
    'tracking': ['detection.trackers'], 'results': ['experiments'],
    'cameras': ['camera_bias', 'camera_labels'],
    'metrics.single': ['metrics.single_shot'],
    'data.sets_msmt17': ['data.readers.msmt17'],
    'data.sets_coco': ['data.readers.coco'],
    'data.trials': ['data.readers.viper', 'data.readers.cuhk03'],
    'data.sets_multiview': ['data.readers.multiviewx', 'data.readers.cityflow',
                            'data.readers.pets2009']}


def _warn(old, new, depth):
    warnings.warn(f'reidlit.{old} is now {" and ".join(f"reidlit.{n}" for n in new)}; '
                  'the old name goes with the next release',
                  DeprecationWarning, stacklevel=depth)


class _Several(ModuleType):
    "An old module whose names are in several modules now."
    def __getattr__(self, name):
        if not name.startswith('__'):
            for m in self._now:
                if hasattr(m, name): return getattr(m, name)
        raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')


class _Finder:
    "Finds old modules; an old name for one new module is that module."
    @staticmethod
    def find_spec(name, path=None, target=None):
        head, _, old = name.partition('.')
        if head == 'reidlit' and old in MODULES: return ModuleSpec(name, _Finder)

    @staticmethod
    def create_module(spec): return _Several(spec.name)

    @staticmethod
    def exec_module(module):
        old = module.__name__.partition('.')[2]
        _warn(old, MODULES[old], 3)
        module._now = [importlib.import_module(f'reidlit.{n}') for n in MODULES[old]]
        if len(module._now) == 1: sys.modules[module.__name__] = module._now[0]


sys.meta_path.append(_Finder)


def moved_names(module, **names):
    "A module's `__getattr__` for names that left it: `old='module.new'`."
    def find(name):
        if name not in names:
            raise AttributeError(f'module {module!r} has no attribute {name!r}')
        where, _, new = names[name].rpartition('.')
        _warn(f'{module.partition(".")[2]}.{name}', [names[name]], 3)
        return getattr(importlib.import_module(f'reidlit.{where}'), new)
    return find
