"""What is unlearned: data cut into forget, adjacent and remote sets, how adjacency is found, models to load."""
from .adjacency import Agreement, Neighbours, agreement, by_knn, by_label, embed, split_by_knn
from .augment import RandomShift
from .cifar import cifar10, cifar100
from .fashion_mnist import fashion_mnist
from .image_classes import ImageClasses
from .image_folder import image_folder
from .models import MODELS, SmallCNN, load_model, load_weights
from .sets import Sets, Triple

__all__ = ["RandomShift", "Agreement", "ImageClasses", "MODELS", "Neighbours", "Sets", "SmallCNN", "Triple", "agreement", "by_knn",
           "by_label", "cifar10", "cifar100", "embed", "fashion_mnist", "image_folder", "load_model",
           "load_weights", "split_by_knn"]
