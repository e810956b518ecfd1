"""Two jobs in two namespaces at once: each trains, neither reaches the other's ports."""

import json
from collections.abc import Callable

from e2e.scenarios.training import ENDLESS, Job, Tenant

STEPS = 4
# Asks the other job's ports with this job's token: HTTP ones, and the weight server in its own protocol.
PROBE = """
import json, os, socket, sys, urllib.error, urllib.request
from grpo_worker.weightsync import wire
token, trainer, *urls = os.environ["GRPO_JOB_TOKEN"], *sys.argv[1:]
codes = {}
with socket.create_connection((trainer, 7602), timeout=5) as connection:
    wire.send_frame(connection, wire.Request(token=token, version=0, digest="", kind="manifest"))
    codes["weights"] = wire.receive_frame(connection, wire.Reply).error
for url in urls:
    request = urllib.request.Request(url, data=b"{}", headers={"Authorization": "Bearer " + token})
    try:
        codes[url] = urllib.request.urlopen(request, timeout=5).status
    except urllib.error.HTTPError as error:
        codes[url] = error.code
    except OSError as error:
        codes[url] = str(error)
print(json.dumps(codes))
"""


def addresses(job: Job) -> dict[str, str]:
    return {name.removeprefix(f"{job.name}-"): pod["status"]["podIP"] for name, pod in job.pods().items()}


def test_jobs_of_two_namespaces_train_side_by_side_and_apart(tenant: Tenant, make_tenant: Callable[[], Tenant]) -> None:
    other = make_tenant()
    jobs = [tenant.submit("twin", trainer=ENDLESS), other.submit("twin", trainer=ENDLESS)]
    for job in jobs:
        job.until_all_ready(600)

    _mine, theirs = jobs
    target = addresses(theirs)
    urls = [
        f"http://{target['coordinator']}:7600/v1/stop",
        f"http://{target['trainer-0']}:7601/v1/trainer",
        f"http://{target['rollout-0']}:7604/v1/generate",
    ]
    answer = tenant.kubectl("exec", "twin-coordinator", "--", "python", "-c", PROBE, target["trainer-0"], *urls)
    # This network does not enforce NetworkPolicies, so it is the token that refuses.
    assert json.loads(answer) == {"weights": "unauthorized", **dict.fromkeys(urls, 401)}

    for job in jobs:
        (policy,) = job.tenant.get("networkpolicies", "-l", job.selector)["items"]
        peers = [peer for rule in policy["spec"]["ingress"] for peer in rule.get("from", [])]
        uid = job.tenant.get("grpojob", job.name)["metadata"]["uid"]
        assert {"podSelector": {"matchLabels": {"grpo.dev/job-uid": uid}}} in peers, policy
        assert all("podSelector" in peer or "namespaceSelector" in peer for peer in peers), policy
    for job in jobs:
        job.until_step(STEPS, 600)
        trained = job.trained()
        assert len(trained) >= STEPS * 32 and len(set(trained[: STEPS * 32])) == STEPS * 32
        assert job.status()["restarts"] == 0
        job.delete()
