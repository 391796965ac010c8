import distclip as dc


def test_one_world(world: dc.World) -> None:
    assert dc.init() is world
    assert 0 <= world.rank < world.size == world.group.size()
