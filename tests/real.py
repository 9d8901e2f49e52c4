"Where real data lies; checks on it are skipped when it is absent."
import os
from pathlib import Path

REAL = Path(os.environ.get('REIDLIT_REAL', Path(__file__).resolve().parents[2] / 'shared' / 'data'))
