"""What reaches an object store: pyarrow for s3://, gs:// and file://, which it brings along; fsspec for any other scheme.

Credentials come from where these look for them: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or the instance's role;
GOOGLE_APPLICATION_CREDENTIALS. Both packages are imported where they are needed.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ray_rl.deadlines import call_within
from ray_rl.errors import ConfigError
from ray_rl.wording import one_line

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

_S3_CONNECT_SECONDS = 10.0
_S3_REQUEST_SECONDS = 30.0
_REGION = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE")
"""What says where a bucket lies; without any of these S3 is asked."""


def check_url(url: str) -> None:
    """Whether it may stand in a command and in records. Raises ConfigError, which shows no secret."""
    scheme, _, place = url.partition("://")
    user, _, rest = place.rpartition("@")
    if ":" in user:  # anywhere before it: a secret key of S3 may have slashes
        raise ConfigError(f"{scheme}://{rest}: a URL is no place for a password; leave it to the environment")
    bare = re.split("[?#]", url, maxsplit=1)[0]
    if bare != url:
        raise ConfigError(f"{bare}: neither ? nor # may stand in the URL of a run; options come from the environment")
    if not place.strip("/"):
        raise ConfigError(f"{url}: names no place; use {scheme}://BUCKET/FOLDER")


def scheme_of(url: str) -> str:
    """What stands before ://."""
    return url.partition("://")[0].lower()


@lru_cache(maxsize=256)
def connect(url: str) -> tuple[FileSystem, str]:
    """The file system of a URL, in pyarrow's terms, and the path in it.

    Raises:
        ConfigError: a package is missing, or the scheme is unknown.
    """
    scheme = scheme_of(url)
    place = url.partition("://")[2]
    if scheme in ("s3", "s3a"):
        return _s3(place.partition("/")[0]), place
    if scheme in ("gs", "gcs"):
        return _gcs(), place
    if scheme in ("file", "local"):
        from pyarrow.fs import LocalFileSystem

        return LocalFileSystem(), os.path.abspath(place)
    import fsspec
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    try:
        files, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ConfigError(f"{url}: {scheme}:// needs a package that is not installed: {one_line(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{url}: {one_line(error)}; use s3://, gs://, or what fsspec knows") from error
    return PyFileSystem(FSSpecHandler(files)), path


@lru_cache(maxsize=16)
def _s3(bucket: str) -> FileSystem:
    """S3, or what speaks its protocol at AWS_ENDPOINT_URL, which pyarrow does not look for by itself."""
    from pyarrow.fs import S3FileSystem, resolve_s3_region

    options: dict[str, Any] = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        options = {"endpoint_override": endpoint}
    elif not any(map(os.environ.get, _REGION)):
        try:
            region = call_within(lambda: resolve_s3_region(bucket), _S3_REQUEST_SECONDS, what="S3 to answer")
        except OSError as error:
            mend = "check the name and the network, or set AWS_REGION"
            raise ConfigError(
                f"s3://{bucket}: where the bucket lies is not known: {one_line(error)}; {mend}"
            ) from error
        options = {"region": region}
    return S3FileSystem(connect_timeout=_S3_CONNECT_SECONDS, request_timeout=_S3_REQUEST_SECONDS, **options)


@lru_cache(maxsize=1)
def _gcs() -> FileSystem:
    from pyarrow.fs import GcsFileSystem

    return GcsFileSystem(retry_time_limit=timedelta(seconds=_S3_REQUEST_SECONDS))
