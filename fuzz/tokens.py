"""What is inserted into the files."""

from __future__ import annotations

import struct

NUMBERS = tuple(
    text.encode()
    for text in (
        "-1", "0", "1e400", "-1e400", "nan", "inf", ".inf", ".nan", "1e-400", "4294967296", "9223372036854775808", "0x" + "f" * 40,
        "1" * 400, "9" * 4301, "1_000", "0o17", "1.5", "-0", "99999999999",
    )
)  # fmt: skip
TEXT = (
    *NUMBERS, b"\0", b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xf0\x9f\x90\xa6", b"\x1b[31m", b"\xe2\x80\xa8",
    b"\x85", b"../", b"../../../../etc/passwd", b"/etc/passwd", b"//", b"x" * 5000, b" ", b"\t", b"'", b'"', b"\\", b"%s", b"{0}",
)  # fmt: skip
YAML = (
    *TEXT, b"!!int ", b"!!float ", b"!!bool ", b"!!timestamp ", b"!!binary ", b"!!set ", b"!!omap ", b"!!str ", b"!!null ", b"!!map ", b"!!seq ",
    b"!own ", b"!!python/object/apply:os.system ", b"&a ", b"*a", b"<<: ", b"<<: *a", b"[", b"]", b"{", b"}", b"- ", b"? ", b": ", b"# ", b"---\n",
    b"...\n", b"%YAML 1.1\n", b"%TAG ! x\n", b"|", b">", b"null", b"~", b"true", b"yes", b"2001-12-14", b"2001-99-99", b"[" * 300, b"{" * 300,
    b"- " * 300, b"1:2:3", b'"\\x00"', b'"\\ud800"', b'"\\UFFFFFFFF"', b"base: ", b"base: finetune\n", b"seed: ", b"model: ", b"data: ", b"optim: ",
    b"trainer: ", b"backbone_args: ", b"variants: ", b"tune: ", b"options: ",
)  # fmt: skip
JSON = (
    *TEXT, b"{}", b"[]", b"null", b"true", b"NaN", b"Infinity", b"{" * 2000, b"[" * 2000, b'{"a":' * 2000, b'"\\u0000"', b'"\\ud800"', b"-", b",", b":",
    b'"schema": 2', b'"../x"', b'{"a": 1, "a": 2}',
)  # fmt: skip
CSV = (*TEXT, b"path", b"label", b"split", b"train", b"test", b"val", b",", b";", b'""', b"sep=;\n", b'"\n')
PARQUET = (
    b"PAR1",
    b"PARE",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f" * 5,
    b"\x80" * 9,
    b"\0" * 4,
    struct.pack("<i", -1),
    struct.pack("<q", 2**62),
)
TAR = (
    *TEXT, b"\0" * 100, b"\0" * 512, b"\x80" + b"\0" * 11, b"\xff" * 12, b"77777777777\0", b"00000000000\0", b"0000000-001\0", b"ustar\0" b"00", b"ustar  \0",
    b"././@LongLink", b"././@PaxHeader", b"25 GNU.sparse.major=1\n", b"26 GNU.sparse.map=0,9,0,1\n", b"18 path=../../a.jpg\n", b"13 size=999\n", b"16 size=1e400999\n",
    b"9999 path=x\n", b"0 path=x\n", b"22 hdrcharset=BINARY\n", b".jpg", b".cls", b".json", b".txt", b"LKSxgX0123456", b"/", b"..",
)  # fmt: skip
ARROW = (
    *JSON, *PARQUET, b"ARROW1", struct.pack("<i", 2**31 - 1), struct.pack("<q", -1), struct.pack("<q", 2**40), struct.pack("<h", -1), b'"../../x"', b'"fingerprint"',
    b"ClassLabel", b"Image", b"Value", b"List", b"Sequence", b"string", b"int64", b"data-00000-of-00001.arrow", b'{"_type": "Image"}', b'{"dtype": "string", "_type": "Value"}',
)  # fmt: skip
MAT = (
    b"\xff" * 4,
    b"\x7f" * 4,
    b"\0" * 4,
    *(struct.pack("<I", value) for value in (0, 1, 2, 5, 6, 9, 14, 15, 17, 2**31, 2**32 - 1, 65536)),
)
BIG = tuple(struct.pack(">I", value) for value in (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1))
IMAGE = (
    *MAT, *BIG, b"\xff\xd8\xff", b"\xff\xd9", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdb", b"\xff\xdd\0\4", b"\xff\xe1",
    b"Exif\0\0II*\0", b"Exif\0\0MM\0*", b"http://ns.adobe.com/xap/1.0/\0", b"tiff:Orientation='6'", b"tiff:Orientation='99'", b"ICC_PROFILE\0",
    b"Adobe", b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"iCCP", b"zTXt", b"eXIf", b"acTL", b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ALPH",
    b"GIF89a", b"BM", b"II*\0", b"MM\0*", b"ftypavif", b"ispe", b"\xffO\xffQ", b"jP  ", b"P3\n", b"P5\n", b"P6\n", b"65535", b"# x\n",
)  # fmt: skip
HTTP = (
    *JSON, b"\r\n\r\n", b"--x", b"--x--", b"--x\r\n", b"Content-Disposition: form-data; name=\"images\"; filename=\"a.jpg\"", b'name="images"', b'filename="',
    b"filename*=utf-8''%ff", b"; charset=undefined", b"; charset=utf-7", b"; boundary=", b"boundary=x", b"boundary=" + b"y" * 300, b'; boundary="', b"multipart/form-data",
    b"application/json", b"image/jpeg", b"application/octet-stream", b"Content-Encoding: gzip\n", b"Content-Type: ", b"Origin: http://x\n", b"Expect: 100-continue\n",
    b"X-Request-ID: \xff\n", b"Accept: */*\n", b"data:image/jpeg;base64,", b"data:,", b"%00", b"%ff", b"%2e%2e/", b"top=", b"&top=1", b"maps=class", b"&target=wren",
    b"format=json", b"/explain", b"/model", b"/docs", b"/page/", b"/metrics", b"GET ", b"HEAD ", b"OPTIONS ", b"Content-Transfer-Encoding: base64\r\n",
)  # fmt: skip
ARCHIVE = (b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\xff" * 4, b"\xff" * 8, b"\0" * 4, b"__metadata__", b"F32", b"F64", b"I64", b"BOOL", b"data_offsets", *NUMBERS[:12])  # fmt: skip
