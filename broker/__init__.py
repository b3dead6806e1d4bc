"""The snapshot broker's daemon: one router, one actor process per snapshotter, one publisher."""
