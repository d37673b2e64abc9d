"""Detection of file formats by their first bytes, for messages about files with a wrong suffix."""

import re

_SIGNATURES: tuple[tuple[str, str], ...] = (
    (r"(II\*\0|MM\0\*|II\+\0|MM\0\+)", "TIFF image"),
    (r"\x89PNG\r\n\x1a\n", "PNG image"),
    (r"\xff\xd8\xff", "JPEG image"),
    (r"BM", "BMP image"),
    (r"GIF8[79]a", "GIF image"),
    (r"RIFF....WEBP", "WebP image"),
    (r"RIFF....AVI ", "AVI video"),
    (r"....ftyp(avif|avis)", "AVIF image"),
    (r"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "HEIC image"),
    (r"....ftyp", "MP4 or QuickTime video"),
    (r"(\0\0\0\x0cjP  |\xff\x4f\xff\x51)", "JPEG 2000 image"),
    (r"(\0\0\0\x0cJXL |\xff\x0a)", "JPEG XL image"),
    (r"II\xbc", "JPEG XR image"),
    (r".{128}DICM", "DICOM file"),
    (r"ZISRAWFILE", "Zeiss CZI file"),
    (r"\xda\xce\xbe\x0a", "Nikon ND2 file"),
    (r"\x70\0\0\0.{4}\x2a", "Leica LIF file"),
    (r"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "compound file (Olympus OIB, Zeiss ZVI or Office)"),
    (r"\x89HDF\r\n\x1a\n", "HDF5 file"),
    (r"\x93NUMPY", "NumPy array"),
    (r"NRRD", "NRRD image"),
    (r"SIMPLE  =", "FITS image"),
    (r"MATLAB ", "MATLAB file"),
    (r"8BPS", "Photoshop image"),
    (r"gimp xcf", "GIMP image"),
    (r"\x76\x2f\x31\x01", "OpenEXR image"),
    (r"P[1-7]\s", "PNM image"),
    (r"%!PS", "PostScript file"),
    (r"%PDF", "PDF file"),
    (r"PK\x03\x04", "zip archive"),
    (r"\x1f\x8b", "gzip archive"),
    (r"\0\x05\x16[\0\x07]", "macOS AppleDouble file"),
    (r"version https://git-lfs", "Git LFS pointer (`git lfs pull` fetches the image)"),
    (r"\s*<(\?xml|!DOCTYPE|html|svg|OME)", "XML or HTML file"),
    (r"\s*[{\[]\s*[\"{\[\]}\d]", "JSON file"),
)
_PATTERNS = tuple((re.compile(signature.encode("latin-1"), re.DOTALL), name) for signature, name in _SIGNATURES)


def kind_of(data: bytes) -> str | None:
    """Return the name of the format of `data`; None if unknown."""
    head = data[:512]
    return next((name for pattern, name in _PATTERNS if pattern.match(head)), None)
