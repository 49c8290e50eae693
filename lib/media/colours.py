"""What a file says of its picture's colours and of which side is up, undone as browsers do."""
import contextlib
import io

import numpy as np
from PIL import ExifTags, Image, ImageCms

ORIENTATIONS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
                7: "TRANSVERSE", 8: "ROTATE_90"}         # of EXIF, as Pillow calls what undoes them
ORIENTATIONS = {number: Image.Transpose[name] for number, name in ORIENTATIONS.items()}
SIDEWAYS = {ORIENTATIONS[number] for number in (5, 6, 7, 8)}


def orientation(exif):
    """What turns a picture upright, by the EXIF data of a PNG; None where nothing does."""
    found = Image.Exif()
    with contextlib.suppress(Exception):         # damaged data may raise nearly anything
        found.load(b"Exif\0\0" + exif)
        return ORIENTATIONS.get(found.get(ExifTags.Base.Orientation))


def colour_change(icc, gamma=0.0):
    """A function from an image to one in sRGB: of a colour profile, or of samples that were encoded with an exponent.

    Where neither says anything, or a profile is damaged, images stay as they are; so they do, in browsers, at an
    exponent of 1 / 2.2, which is nearly sRGB's."""
    if not icc and (gamma <= 0 or abs(gamma - 1 / 2.2) < 0.005):
        return lambda image: image
    if not icc:
        linear = (np.arange(256) / 255) ** (1 / gamma)
        table = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        table = [round(255 * min(float(v), 1.0)) for v in table]
        return lambda image: image.convert("RGBA").point(table * 3 + list(range(256)))
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}[profile.profile.xcolor_space.strip()]
        change = ImageCms.buildTransform(profile, SRGB, mode, "RGB")
    except (ImageCms.PyCMSError, OSError, KeyError, ValueError, TypeError):
        return lambda image: image

    def changed(image):
        if (image.mode == "CMYK") != (mode == "CMYK"):                       # a profile of another picture
            return image
        rgba = image.convert("RGBA")
        out = ImageCms.applyTransform(image.convert(mode), change)
        out.putalpha(rgba.getchannel("A"))
        return out
    return changed


SRGB = ImageCms.createProfile("sRGB")
