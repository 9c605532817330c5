__version__ = "0.1.0"

from .models import create_model, list_models, load_model, save_model
from .select import Mass, TopK
