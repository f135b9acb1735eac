"""What gcloud's errors mean to a run."""

import pytest

from launch.backends.tpu.gcloud import of_operation, understand

_STORM = (
    "ERROR: gcloud crashed (HttpError): HttpError accessing <http://127.0.0.1:1/v2>: response: "
    '<{\'server\': \'x\', \'status\': 503}>, content <{"error": {"code": 503, "message": "busy", '
    '"status": "UNAVAILABLE"}}> This may be due to network connectivity issues.'
)
_RATE = (
    "Quota exceeded for quota metric 'Write requests' and limit 'Write requests per minute per "
    "user' of service 'tpu.googleapis.com'"
)
_QUOTA = "Quota limit 'TPUV5sLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0"
_TOKEN = (
    ". This command is authenticated with an access token from /a/b.c specified by the "
    "[auth/access_token_file] property"
)


@pytest.mark.parametrize(
    ("text", "kind", "said", "begun"),
    [
        (_STORM, "unavailable", "UNAVAILABLE: busy", True),
        (f"ERROR: (gcloud.x) RESOURCE_EXHAUSTED: {_RATE}", "unavailable", None, True),
        (f"ERROR: (gcloud.x) RESOURCE_EXHAUSTED: {_QUOTA}", "quota", None, False),
        (
            f"WARNING: x\nERROR: (gcloud.x-y.z) PERMISSION_DENIED: not you{_TOKEN}",
            "permission",
            "PERMISSION_DENIED: not you.",
            False,
        ),
        ('ERROR: (a.b) {\n  "code": 13,\n  "message": "oh"\n}', "failure", "INTERNAL: oh", True),
        (
            'ERROR: (a.b) {\n "code": 8,\n "message": "no more capacity in \\"z\\""}',
            "stockout",
            'RESOURCE_EXHAUSTED: no more capacity in "z"',
            True,
        ),
        ("", "gcloud", "it said nothing", True),
        ("ERROR: something new {of: nobody}", "gcloud", "something new {of: nobody}", True),
    ],
)
def test_an_error_is_told_in_its_own_words_and_sorted(text, kind, said, begun):
    error = understand(text)
    assert (error.kind, error.begun) == (kind, begun)
    assert said in (None, error.said)


def test_an_operation_without_a_reason_may_go_well_the_next_time():
    assert of_operation({}).kind == "failure"
    assert of_operation({"code": 7, "message": "no"}).kind == "permission"
