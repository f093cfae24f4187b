"""The picture as the vision tower sees it."""

from collections.abc import Mapping
from typing import Any

from PIL import Image

from lit_reduce.backbones import Backbone


def model_view(backbone: Backbone, inputs: Mapping[str, Any], picture: Image.Image) -> Image.Image:
    """The first picture of a batch, resized and cropped as the tower sees it, back from normalised values.

    Families that cut a picture into tiles or patches lose its shape in their inputs; there it is ``picture`` itself.
    """
    from torchvision.transforms.functional import to_pil_image

    pixels = inputs["pixel_values"]
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        return picture
    processor = backbone.processor.image_processor
    values = pixels[0].float().cpu()
    mean, std = (values.new_tensor(each)[:, None, None] for each in (processor.image_mean, processor.image_std))
    image: Image.Image = to_pil_image((values * std + mean).clamp(0, 1))
    return image
