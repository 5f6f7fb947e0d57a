"""Which OpenGL draws the pictures: EGL on a GPU or through Mesa, else OSMesa, else none.

MuJoCo and dm_control read ``MUJOCO_GL`` once, when they are imported, so ``import envs`` calls ``choose_backend``
before anything here imports them. Nothing in this module imports MuJoCo, PyOpenGL or a driver's Python side.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import platform
from contextlib import suppress

INSTALL_OPENGL = "apt-get install libegl1 libgles2 libosmesa6"

_EGL_PLATFORM_DEVICE_EXT = 0x313F
_EGL_CLIENT_APIS = 0x308D
_MAX_DEVICES = 16


class NoOpenGL(RuntimeError):
    """No OpenGL can draw a picture on this machine. The message is one line and says what to do."""


def no_opengl(reason: str) -> NoOpenGL:
    """The one error for every way in which OpenGL can be missing."""
    return NoOpenGL(
        f"No picture can be rendered: {_refused or ' '.join(reason.split())}. "
        f"Run `{INSTALL_OPENGL}` as root, or use obs=state, which needs no OpenGL."
    )


_refused = ""
"""Why the ``MUJOCO_GL`` that was asked for, or every one, cannot be used; empty when one can."""


def choose_backend() -> str:
    """Sets ``MUJOCO_GL`` (and ``PYOPENGL_PLATFORM`` to match) when it is unset, and returns its value.

    A value that the user set is kept if it can be used. ``disabled`` stands for no OpenGL: simulation and state
    observations still work, and the first picture raises :class:`NoOpenGL`, where importing dm_control with a
    driver missing would have failed with PyOpenGL's AttributeError. Takes about 20 ms, and what Triton takes.
    """
    global _refused
    _load_triton()
    asked = os.environ.get("MUJOCO_GL", "").strip().lower()
    chosen = asked or ("egl" if _has_egl() else "osmesa" if _has_osmesa() else "disabled")
    if platform.system() != "Linux":
        chosen = asked or "glfw"  # macOS and Windows draw offscreen through their own window system
    elif not asked and chosen == "disabled":
        _refused = "neither EGL nor OSMesa was found"
    elif (chosen == "egl" and not _has_egl()) or (chosen == "osmesa" and not _has_osmesa()):
        _refused = f"MUJOCO_GL={chosen} is set, but {chosen} does not work here"
        chosen = "disabled"
    os.environ["MUJOCO_GL"] = chosen
    if chosen in ("egl", "osmesa"):
        os.environ.setdefault("PYOPENGL_PLATFORM", chosen)
    return chosen


def _load_triton() -> None:
    """Triton, which PyTorch's CUDA build for Linux brings, has an LLVM of its own. Loaded after Mesa's OpenGL with
    another LLVM it crashes the process, at an optimiser's first step for instance; before it, both work."""
    if platform.system() == "Linux":
        with suppress(ImportError, OSError):
            importlib.import_module("triton")


def _has_osmesa() -> bool:
    return any(_loads(f"libOSMesa.so{version}") for version in (".8", ".6", ""))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@functools.cache
def _has_egl() -> bool:
    """Whether an EGL device can be opened without a display and offers desktop OpenGL (MuJoCo needs it, not GLES).

    Through ctypes: PyOpenGL's own failure without a driver is an AttributeError at import, which nothing can undo.
    """
    if not (_loads("libOpenGL.so.0") or _loads("libGLESv2.so.2")):
        return False  # PyOpenGL wants one of them beside EGL itself
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        query_devices = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
        get_display = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
        egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
        egl.eglTerminate.argtypes = [ctypes.c_void_p]
        egl.eglQueryString.argtypes = [ctypes.c_void_p, ctypes.c_int]
        egl.eglQueryString.restype = ctypes.c_char_p
    except (OSError, AttributeError):
        return False
    if not query_devices or not get_display:
        return False
    devices = (ctypes.c_void_p * _MAX_DEVICES)()
    count = ctypes.c_int(0)
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query_devices)
    if not query(_MAX_DEVICES, ctypes.addressof(devices), ctypes.addressof(count)):
        return False
    display_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(get_display)
    for device in devices[: count.value]:
        display = display_of(_EGL_PLATFORM_DEVICE_EXT, device, None)
        if display and egl.eglInitialize(display, None, None):
            offers_opengl = b"OpenGL" in (egl.eglQueryString(display, _EGL_CLIENT_APIS) or b"").split()
            egl.eglTerminate(display)
            if offers_opengl:
                return True
    return False
