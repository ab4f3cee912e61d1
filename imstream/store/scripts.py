"""The Lua scripts of the store: each file in `lua/` is one atomic step."""

from importlib import resources

from imstream.redis.client import Script

LUA = {
    file.name.removesuffix(".lua"): Script(file.read_text("utf-8"))
    for file in (resources.files("imstream.store") / "lua").iterdir()
}
