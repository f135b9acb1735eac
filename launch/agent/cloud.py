"""What a machine of Google Cloud may do as its own service account, asked with nothing but the
standard library."""

import json
import urllib.parse
import urllib.request

METADATA_HOST = "GCE_METADATA_HOST"  # Google's own libraries read it too.
_TOKEN = "/computeMetadata/v1/instance/service-accounts/default/token"
_REQUEST_SECONDS = 30.0


def request(metadata, url, method, data=None):
    """Make a request as the machine's service account; the answer's content.

    Args:
      metadata: the metadata server, which gives the token.
      url: what is asked.
      method: `DELETE`, `POST`, ...
      data: that goes along.

    Raises:
      OSError: there is no answer, or it is a refusal (urllib.error.HTTPError).
      ValueError, KeyError: the metadata server's answer is none.
    """
    token = urllib.request.Request("http://%s%s" % (metadata, _TOKEN))
    token.add_header("Metadata-Flavor", "Google")
    # No proxy: the token must not go anywhere else.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(token, timeout=_REQUEST_SECONDS) as answer:
        word = json.load(answer)["access_token"]
    asked = urllib.request.Request(url, data=data, method=method)
    asked.add_header("Authorization", "Bearer %s" % word)
    if data is not None:
        asked.add_header("Content-Type", "application/octet-stream")
    with urllib.request.urlopen(asked, timeout=_REQUEST_SECONDS) as answer:
        return answer.read()


def try_bucket(metadata, api, place, name):
    """Write an object, and delete it.

    Args:
      metadata: see request.
      api: the root of Cloud Storage's JSON API.
      place: `gs://BUCKET/PATH`.
      name: of the object, below that.

    Raises:
      OSError, ValueError, KeyError: see request.
    """
    bucket, _, path = place[len("gs://") :].partition("/")
    name = urllib.parse.quote("/".join(filter(None, [path.strip("/"), name])), safe="")
    upload = "%supload/storage/v1/b/%s/o?uploadType=media&name=%s" % (api, bucket, name)
    request(metadata, upload, "POST", b"written to try it\n")
    request(metadata, "%sstorage/v1/b/%s/o/%s" % (api, bucket, name), "DELETE")
