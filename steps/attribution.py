"""Step 9: which places of an image speak for the answer that the model gives."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .console import progress

CELLS = 16  # per side of a map
STEPS = 8  # between the blurred image and the image
BLACK = 8  # grey levels of 256: what is darker in all channels is a frame, with the noise of JPEG


def attribute(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return what each place adds to the log-odds of the predicted class, float32 (n, CELLS, CELLS).

    Integrated gradients (Sundararajan, Taly and Yan 2017, arXiv 1703.01365) from a blurred copy to the image:
    the sum over a map is, nearly, the log-odds of the image less those of the copy. What is the same in both,
    such as a black corner, adds nothing of its own. `pixels` is uint8 (n, channels, size, size).
    """
    images = progress(pixels.to(model.device), desc="what speaks for the answers")
    return torch.cat([attribute_one(model, image[None]) for image in images]).cpu()


def attribute_one(model: PreTrainedModel, image: torch.Tensor) -> torch.Tensor:
    """Return the map of one image (1, channels, size, size): all its steps are one batch."""
    copy = blur(image.float())
    detail = image - copy
    shares = (torch.arange(STEPS, device=image.device) + 0.5) / STEPS
    inputs = (copy + shares.view(-1, 1, 1, 1) * detail - model.pixel_mean) / model.pixel_std
    with torch.no_grad():
        guess = model.eval()(pixel_values=image).logits.argmax(1)
    gradients = torch.autograd.grad(log_odds(model, inputs.requires_grad_(), guess).sum(), inputs)[0]
    added = (gradients.mean(0, keepdim=True) * detail / model.pixel_std).sum(1)
    cells = F.adaptive_avg_pool2d(added, CELLS) * added[0].numel() / CELLS**2
    inside = F.avg_pool2d(torch.ones_like(cells), 3, 1, 1)  # of a cell and its neighbours
    return F.avg_pool2d(cells / inside, 3, 1, 1)  # shared among them: gradients are noisy, the sum stays


def log_odds(model: PreTrainedModel, inputs: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of the class `guess` (1,) for inputs (n, channels, size, size)."""
    logits = model(pixel_values=inputs).logits
    others = torch.arange(logits.shape[1], device=guess.device) != guess
    return logits[:, guess[0]] - logits[:, others].logsumexp(1)


def blur(images: torch.Tensor) -> torch.Tensor:
    """Return float images (n, channels, size, size) of which only the coarsest light and tint are left.

    What decides an answer must be gone, or no map can show it. But what is black stays black, and darkens
    nothing around it: the frame of a round picture would else count as detail.
    """
    lit = (images.amax(1, keepdim=True) >= BLACK).float()
    mean = smooth(images * lit) / smooth(lit).clamp(min=1e-3)
    return torch.where(lit > 0, mean, images)


def smooth(images: torch.Tensor) -> torch.Tensor:
    """Return images (n, channels, size, size) without what is smaller than half of their side."""
    coarse = F.adaptive_avg_pool2d(images, 4)
    coarse = F.avg_pool2d(F.pad(coarse, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return F.interpolate(coarse, images.shape[-2:], mode="bilinear")
