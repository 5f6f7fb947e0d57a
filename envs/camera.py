"""One camera per environment: its OpenGL context, its scene, and the two rendering profiles.

``canonical`` is the picture that dm_control (or Gymnasium, for its own tasks) draws, pixel for pixel. ``fast`` turns
shadows, reflections and multisampling off, and draws at twice the size to average each 2×2 pixels: without that, what
is thinner than a pixel vanishes and what moves by less than one stands still. In software that costs little, where
multisampling is dear.

The cameras of a thread draw in one OpenGL context, each into buffers of its own. Every picture makes the context
current and chooses its buffers first: what dm_control remembers as current need not be it where ``mujoco.Renderer`` is
used beside it, and that is what corrupts pictures.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, Literal

import mujoco
import numpy as np
from jaxtyping import UInt8

from envs import opengl
from envs.wrappers import UnsupportedSetting

try:
    from dm_control import _render
    from dm_control.mujoco import wrapper
    from dm_control.mujoco.engine import Contexts, Physics
except (AttributeError, ImportError, RuntimeError) as error:  # PyOpenGL without a driver raises AttributeError
    raise opengl.no_opengl(f"{type(error).__name__} while loading it ({error})") from error

Profile = Literal["fast", "canonical"]
Image = UInt8[np.ndarray, "size size 3"]

SUPERSAMPLING: dict[Profile, int] = {"fast": 2, "canonical": 1}
"""Drawn pixels along each side of one pixel of the image."""


def apply_profile(model: mujoco.MjModel, size: int, profile: Profile) -> None:
    """Sets the model's buffer sizes. Must come before the model's first context, which copies them.

    The offscreen buffer is as large as what is drawn: the pictures are the same as from a larger one.
    """
    model.vis.global_.offwidth = model.vis.global_.offheight = size * SUPERSAMPLING[profile]
    if profile == "fast":
        model.vis.quality.offsamples = 0
        model.vis.quality.shadowsize = 0


def fixed_view(model: mujoco.MjModel, camera: int) -> mujoco.MjvCamera:
    """The model's camera number ``camera``; -1 is the free camera that dm_control gives every model.

    Raises:
        UnsupportedSetting: the model has no such camera.
    """
    if not -1 <= camera < model.ncam:
        raise UnsupportedSetting(f"camera {camera} does not exist: this task has cameras -1 (free) to {model.ncam - 1}")
    view = mujoco.MjvCamera()
    view.fixedcamid = camera
    if camera == -1:
        view.type = mujoco.mjtCamera.mjCAMERA_FREE
        mujoco.mjv_defaultFreeCamera(model, view)
    else:
        view.type = mujoco.mjtCamera.mjCAMERA_FIXED
    return view


def average_blocks(image: UInt8[np.ndarray, "drawn drawn 3"], fine: int) -> Image:
    """The mean of each ``fine``×``fine`` block of pixels, rounded; a new array."""
    if fine == 1:
        return image.copy()
    total = sum(image[i::fine, j::fine].astype(np.uint16) for i in range(fine) for j in range(fine))
    return ((total + fine * fine // 2) // (fine * fine)).astype(np.uint8)  # type: ignore[union-attr]


_opened_in: set[int] = set()
"""The processes that have opened OpenGL: this one, and those that it was forked from."""


@functools.cache
def _opengl(process: int, thread: int) -> Any:
    """The OpenGL context of a thread, in which each of its cameras has a context of MuJoCo's. One more would compile
    its shaders anew, which takes .3 s in software. It stays to the end.

    Args:
        process: this one.
        thread: this one; a context is current in one thread at a time.
    """
    context = _render.Renderer(max_width=1, max_height=1)  # MuJoCo draws into buffers of its own
    context.increment_refcount()
    free = context._free_unconditionally

    def free_at_exit() -> None:
        with suppress(Exception):  # mujoco.Renderer, if one was used, has ended the display that both share before
            free()

    context._free_unconditionally = free_at_exit
    return context


def _refuse_fork() -> None:
    """In a process that was forked after pictures were drawn, Mesa would wait for its threads for ever.

    Raises:
        NoOpenGL: this is one.
    """
    _opened_in.add(os.getpid())
    if len(_opened_in) > 1 and os.environ.get("LP_NUM_THREADS") != "0":
        raise opengl.NoOpenGL(
            "No picture can be rendered: this process was forked from one that had drawn pictures, which OpenGL does "
            "not survive. Start processes by spawn, as with gymnasium.make_vec(…, vector_kwargs={'context': 'spawn'}), "
            "or set LP_NUM_THREADS=0 where Mesa draws."
        )


@contextmanager
def _current(gl: Any) -> Iterator[Any]:
    """While entered, ``gl`` is the thread's OpenGL context, even if something else than dm_control chose another one
    since: ``mujoco.Renderer`` does, and so do Gymnasium's own pictures."""
    with gl.make_current() as thread:
        thread.call(gl._platform_make_current)
        yield thread


class Camera:
    """Draws one model's state. The context is made at the first picture, so a state-only environment needs none.

    Args:
        model: the simulated model; ``apply_profile`` was called on it.
        data: its state, read at each picture.
        view: from ``fixed_view`` or filled in by hand.
        size: image height and width.
        physics: the dm_control physics that owns ``model``; the context is kept there then, because some of its tasks
            upload terrain to it.
    """

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        view: mujoco.MjvCamera,
        size: int,
        profile: Profile,
        physics: Physics | None = None,
    ) -> None:
        self._model, self._data, self._view, self._physics = model, data, view, physics
        self._fine = SUPERSAMPLING[profile]
        drawn = size * self._fine
        self._viewport = mujoco.MjrRect(0, 0, drawn, drawn)
        self._buffer = np.empty((drawn, drawn, 3), np.uint8)
        self._option = wrapper.MjvOption()  # dm_control's: unlike MuJoCo's own it does not draw rangefinders
        self._perturb = mujoco.MjvPerturb()
        self._scene = mujoco.MjvScene(model, maxgeom=2000 + 8 * model.ngeom)
        if profile == "fast":
            self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._contexts: Contexts | None = None

    def render(self) -> Image:
        """The picture of the state as it is now; a new array each time.

        Raises:
            NoOpenGL: there is nothing to draw with.
        """
        contexts = self._found_contexts()
        mujoco.mjv_updateScene(
            self._model, self._data, self._option, self._perturb, self._view, mujoco.mjtCatBit.mjCAT_ALL, self._scene
        )
        with _current(contexts.gl) as thread:
            thread.call(self._draw, contexts.mujoco.ptr)
        return average_blocks(self._buffer[::-1], self._fine)  # OpenGL's first row is the bottom one

    def _found_contexts(self) -> Contexts:
        holder: Any = self if self._physics is None else self._physics
        _refuse_fork()
        if holder._contexts is None:
            try:
                gl = _opengl(os.getpid(), threading.get_ident())
                with _current(gl):
                    holder._contexts = Contexts(gl, wrapper.MjrContext(SimpleNamespace(ptr=self._model), gl))
            except (RuntimeError, mujoco.FatalError) as error:
                raise opengl.no_opengl(str(error).rstrip(".")) from error
        return holder._contexts

    def _draw(self, context: mujoco.MjrContext) -> None:
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, context)  # the last picture may be another camera's
        mujoco.mjr_render(self._viewport, self._scene, context)
        mujoco.mjr_readPixels(self._buffer, None, self._viewport, context)

    def close(self) -> None:
        """Frees what was drawn with. May be called twice."""
        holder: Any = self if self._physics is None else self._physics
        if holder._contexts is not None:
            with _current(holder._contexts.gl):
                holder._contexts.mujoco.free()
            holder._contexts = None
