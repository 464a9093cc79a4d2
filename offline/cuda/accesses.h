// The functions that `-fsanitize=thread` calls at each load and store, all led to one hook.
#pragma once

extern "C" {
// Where the library lies: constants in it are no business of the hook's.
extern char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[];
UM_UNSEEN void um_image(const void **first, const void **last) {
    *first = __ehdr_start;
    *last = _end;
}

UM_UNSEEN void __tsan_init() {}
UM_UNSEEN void __tsan_func_entry(void *) {}
UM_UNSEEN void __tsan_func_exit() {}
UM_UNSEEN void __tsan_vptr_update(void **, void *) {}
UM_UNSEEN void __tsan_read_range(void *at, size_t size) { um_hooks.access(at, size, 1, __builtin_return_address(0)); }
UM_UNSEEN void __tsan_write_range(void *at, size_t size) { um_hooks.access(at, size, 2, __builtin_return_address(0)); }

#define UM_ACCESS(name, size, kind)                                                                                    \
    UM_UNSEEN void name(void *at) { um_hooks.access(at, size, kind, __builtin_return_address(0)); }
#define UM_ACCESSES(size)                                                                                              \
    UM_ACCESS(__tsan_read##size, size, 1)                                                                              \
    UM_ACCESS(__tsan_write##size, size, 2)                                                                             \
    UM_ACCESS(__tsan_unaligned_read##size, size, 1)                                                                    \
    UM_ACCESS(__tsan_unaligned_write##size, size, 2)                                                                   \
    UM_ACCESS(__tsan_volatile_read##size, size, 1)                                                                     \
    UM_ACCESS(__tsan_volatile_write##size, size, 2)
UM_ACCESSES(1)
UM_ACCESSES(2)
UM_ACCESSES(4)
UM_ACCESSES(8)
UM_ACCESSES(16)
}
