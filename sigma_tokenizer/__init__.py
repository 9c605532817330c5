__version__ = "0.1.0"

from .models import SigmaModel, create_model, list_models, list_pretrained
from .select import TopK, TopP
