from ray_rl.config.nodes import Node


def test_a_node_as_ray_tells_of_it():
    row = {
        "NodeName": "10.0.0.7",
        "NodeManagerAddress": "10.0.0.7",
        "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": 2.0**31, "object_store_memory": 1e9, "fast_disk": 1.0},
        "Labels": {"pool": "rollout", "ray.io/node-id": "abc"},
    }
    assert Node.of_ray(row) == Node(
        name="10.0.0.7",
        cpus=8,
        gpus=2,
        memory_gib=2,
        resources={"fast_disk": 1},
        labels={"pool": "rollout", "ray.io/node-id": "abc"},
    )


def test_a_node_that_offers_nothing_but_a_place_for_ray_itself():
    row = {"NodeName": "", "NodeManagerAddress": "10.0.0.7", "Resources": {}, "Labels": {}}
    assert Node.of_ray(row) == Node(name="10.0.0.7", cpus=0)
