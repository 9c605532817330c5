__version__ = "0.2.0"

from .models import SigmaModel, create_model, list_models, list_pretrained
from .select import TopK, TopP
