"""Pictures in, vectors out: a strict decoder, EfficientNet-Lite0 from its packages, or any Hugging Face vision model in a local folder.

Preprocessing: the shorter side becomes `size` pixels (bicubic), the middle square is kept, transparency is laid on white, EXIF rotation is applied.
`decode_image` never raises on a bad file and never allocates pixels before the header's size is checked: it returns why the picture is refused.
Torch is loaded with the first encoder, never by importing this module: the Spark driver names encoders without it.
Legend: B batch, S pixels per side, D width.
"""

from __future__ import annotations

import io
import json
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.device import best_device
from pipeline.encoders.base import EncoderOptions, Vectors, encoder_id, finished, padded, weights_digest
from pipeline.encoders.text import load_model

if TYPE_CHECKING:
    from torch import Tensor, nn

Pixels = NDArray[np.uint8]
FORMATS = ("JPEG", "PNG", "WEBP")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF")
FOREIGN = {b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"<svg": "SVG"}
# What Pillow's parsers raise on damaged files; anything else is our own mistake and must be seen.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError, struct.error, zlib.error)

Reason = Literal[
    "image_undecodable",
    "image_truncated",
    "image_too_many_pixels",
    "image_unsupported_format",
    # given by whoever reads the bytes
    "image_missing",
    "image_outside_root",
    "image_too_large",
    "image_changed",
]


@dataclass(frozen=True)
class RejectReason:
    """Why a picture is refused: a reason code and what was found (the same words for the same file, always)."""

    reason: Reason
    detail: str


def decode_image(content: bytes, max_pixels: int, size: int) -> Pixels | RejectReason:
    """The picture's middle square as uint8 (size, size, 3) RGB, or why it is refused.

    Args:
        content: bytes of a JPEG, PNG or WEBP file.
        max_pixels: width * height that the header may announce.
        size: pixels per side of the result.
    """
    try:
        with _guarded(max_pixels), Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                return RejectReason("image_too_many_pixels", f"{width} x {height}, at most {max_pixels} pixels")
            picture.draft("RGB", (2 * size, 2 * size))  # JPEG only: decode at a fraction of the size where that is enough
            return _square(_rgb(ImageOps.exif_transpose(picture)), size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return RejectReason("image_too_many_pixels", f"the header announces more than {max_pixels} pixels")
    except DAMAGE as error:
        return _diagnosis(content, error)


@contextmanager
def _guarded(max_pixels: int) -> Iterator[None]:
    """Pillow's own limit at ours while the header is read; its remarks about odd but readable files are not errors."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _rgb(picture: Image.Image) -> Image.Image:
    """The picture as RGB: palettes resolved, transparency on white, 16-bit greys scaled to 8."""
    if picture.mode.startswith(("I", "F")):
        grey = np.asarray(picture)  # of its own width: 16 bits as 64 would be eight times the picture
        picture = Image.fromarray(((grey.astype(np.int64) if grey.dtype.kind == "f" else grey) >> 8).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return picture.convert("RGB")


def _square(picture: Image.Image, size: int) -> Pixels:
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0))


def _diagnosis(content: bytes, error: Exception) -> RejectReason:
    """The reason code of a file that Pillow could not read; details never quote addresses or paths."""
    foreign = next((name for magic, name in FOREIGN.items() if content.startswith(magic)), "AVIF or HEIC" if content[4:8] == b"ftyp" else "")
    if foreign:
        return RejectReason("image_unsupported_format", f"{foreign}, expected {', '.join(FORMATS)}")
    if not content.startswith(SIGNATURES):
        return RejectReason("image_undecodable", f"{len(content)} bytes that are no picture")
    if "truncated" in str(error).lower() or _ends_early(content):
        return RejectReason("image_truncated", f"the file ends after {len(content)} bytes")
    return RejectReason("image_undecodable", "no picture behind the header" if isinstance(error, UnidentifiedImageError) else type(error).__name__)


def _ends_early(content: bytes) -> bool:
    """Whether a file with a good signature is shorter than its own header says."""
    if content.startswith(b"RIFF"):
        return len(content) < 12 or int.from_bytes(content[4:8], "little") + 8 > len(content)
    return len(content) < 33  # PNG: signature and IHDR


class EfficientNetLite0:
    """EfficientNet-Lite0 without its classifier: mean over the last feature map, 1280 wide; only the published weights are accepted.

    The network and its weights come from their packages. For inference the batch norms are folded into the convolutions and even padding moves
    into them (same function up to rounding, 2 to 3 times as fast); pixels are scaled to (x - 127) / 128 as in its training.
    """

    sha256: ClassVar[str] = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    dim = 1280

    def __init__(self, folder: Path, options: EncoderOptions) -> None:
        import torch

        self.encoder_id = self.identify(folder, options)
        self._options = options
        self._device = best_device()
        self._net: Any = folded(load_lite0(folder, options.size)).to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def identify(cls, folder: Path, options: EncoderOptions) -> str:
        """The encoder's id: name, weights, pixels per side, pass size, normalisation."""
        return encoder_id(options, weights_digest(folder, "*.pth", cls.sha256))

    def encode(self, batch: Pixels) -> Vectors:
        """Vectors (B, 1280) float32 of pictures uint8 (B, size, size, 3)."""
        return encode_pixels(batch, self._forward, self._options, self.dim)

    def _forward(self, pixels_BSS3: Tensor) -> Tensor:
        scaled = (pixels_BSS3.to(self._device).float() - 127.0) / 128.0
        features: Tensor = self._net.extract_features(scaled.permute(0, 3, 1, 2))  # a view: already channels last
        return features.mean((2, 3))


class VisionModel:
    """A Hugging Face vision model: its image features where it has such a head (CLIP, SigLIP), else its pooled output, else the mean over patches.

    Mean and standard deviation of the pixels come from its preprocessor_config.json, one half where it says nothing.
    Raises: ContractError without safetensors weights.
    """

    def __init__(self, folder: Path, options: EncoderOptions) -> None:
        import torch

        self.encoder_id = self.identify(folder, options)
        self._options = options
        self._model = load_model(folder)
        mean, std = read_scaling(folder)
        self._mean, self._std = (torch.tensor(values, device=self._model.device) for values in (mean, std))
        self.dim = len(self._one(np.zeros((1, options.size, options.size, 3), dtype=np.uint8)))

    @classmethod
    def identify(cls, folder: Path, options: EncoderOptions) -> str:
        """The encoder's id: name, weights, pixels per side, pass size, normalisation."""
        return encoder_id(options, weights_digest(folder, "*.safetensors"))

    def encode(self, batch: Pixels) -> Vectors:
        """Vectors (B, D) float32 of pictures uint8 (B, size, size, 3)."""
        return encode_pixels(batch, self._forward, self._options, self.dim)

    def _one(self, picture_1SS3: Pixels) -> Vectors:
        import torch

        with torch.inference_mode():
            return np.asarray(self._forward(torch.from_numpy(picture_1SS3))[0].cpu().numpy())

    def _forward(self, pixels_BSS3: Tensor) -> Tensor:
        scaled = (pixels_BSS3.to(self._model.device).float() / 255.0 - self._mean) / self._std
        values = scaled.permute(0, 3, 1, 2)
        output = self._model.get_image_features(pixel_values=values) if hasattr(self._model, "get_image_features") else self._model(pixel_values=values)
        return one_vector(output)


def one_vector(output: Any) -> Tensor:
    """(B, D) from whatever a vision model returns: a tensor, a pooled output (B, D) or (B, D, 1, 1), or patches (B, T, D)."""
    import torch

    if isinstance(output, torch.Tensor):
        return output
    if getattr(output, "pooler_output", None) is not None:
        return torch.flatten(output.pooler_output, 1)
    patches: Tensor = output.last_hidden_state
    return patches.mean(1)


def read_scaling(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of pixels in [0, 1], from preprocessor_config.json; one half by default."""
    path = folder / "preprocessor_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content.get("image_mean") or [0.5] * 3, content.get("image_std") or [0.5] * 3


def encode_pixels(pixels_BSS3: Pixels, forward: Any, options: EncoderOptions, dim: int) -> Vectors:
    """Vectors (B, D) float32 by passes of exactly `options.batch` pictures, the last one padded."""
    import torch

    vectors = np.zeros((len(pixels_BSS3), dim), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(pixels_BSS3), options.batch):
            block = pixels_BSS3[start : start + options.batch]
            vectors[start : start + options.batch] = forward(torch.from_numpy(padded(block, options.batch)))[: len(block)].float().cpu().numpy()
    return finished(vectors, normalize=options.normalize)


def load_lite0(folder: Path, size: int) -> nn.Module:
    """The plain network with its published weights, ready to infer."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet

    net: nn.Module = EfficientNet.from_name("efficientnet-lite0", image_size=size)
    path = next(iter(folder.glob("*.pth")))
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=True)
    return net.eval()


def folded(net: Any) -> Any:
    """The network changed in place for inference: no batch norms, no copies for even padding, activations in place."""
    from torch import nn

    _fold(net, "_conv_stem", "_bn0")
    _fold(net, "_conv_head", "_bn1")
    for block in net._blocks:
        for convolution, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            _fold(block, convolution, norm)
    for module in net.modules():
        if hasattr(module, "_swish"):
            module._swish = nn.ReLU6(inplace=True)
    return net


def _fold(owner: Any, convolution: str, norm: str) -> None:
    """One batch norm folded into its convolution, and the convolution's padding into itself where both sides are equal."""
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    if not hasattr(owner, convolution):  # the first block has no expansion
        return
    layer, bn = getattr(owner, convolution), getattr(owner, norm)
    layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
    setattr(owner, norm, nn.Identity())
    padding = getattr(layer.static_padding, "padding", None)  # left, right, top, bottom
    if padding is not None and padding[0] == padding[1] and padding[2] == padding[3]:
        layer.padding = (padding[2], padding[0])
        layer.static_padding = nn.Identity()
