"""Real, if synthetic, speech: espeak-ng says words in several voices, into wave files. Needs espeakng-loader."""

import ctypes
from functools import cache

VOICES = ("en+m1", "en+m3", "en+m7", "en+f2", "en+f4", "en-us+m2", "en-us+f3", "en-gb-scotland+m4")
_SYNCHRONOUS, _RATE, _PITCH, _UTF8 = 2, 1, 3, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


@cache
def _library():
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    assert rate > 0, "espeak-ng doesn't find its data"
    return library, rate


def say(text, voice="en", *, speed=160, pitch=50):
    """(samples int16 of NumPy, samples a second)"""
    import numpy as np

    library, rate = _library()
    heard = []

    @_CALLBACK
    def callback(samples, count, events):
        if samples and count:
            heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(callback)
    assert library.espeak_SetVoiceByName(voice.encode()) == 0, voice
    library.espeak_SetParameter(_RATE, speed, 0)
    library.espeak_SetParameter(_PITCH, pitch, 0)
    content = text.encode()
    size = ctypes.c_size_t(len(content) + 1)
    assert library.espeak_Synth(content, size, 0, 0, 0, _UTF8, None, None) == 0
    library.espeak_Synchronize()
    return np.concatenate(heard), rate
