"""A seeded sample of faults that a command meets: damage, a source that changes, a checkpoint made to harm.

``python -m tests.faults --long`` has them all, and docs/faults.md what came out.
"""

import pytest

from tests.faults import watch
from tests.faults.samples import check, sample

SUITES = ("flips", "sources", "promises")
pytestmark = pytest.mark.skipif(watch.compiler() is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Every case of the samples, by suite; one process runs them all."""
    return sample(SUITES, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("suite", SUITES)
def test_a_fault_is_refused_or_told(suite, cases):
    check(cases[suite])
