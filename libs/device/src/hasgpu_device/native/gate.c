/* The gate's critical section: what gate_core.PythonCore does, in place on the shared page.
 *
 * A decision falls between two segments, when the model that just ran has driven everything else out of the caches;
 * there, interpreted code takes a hundred microseconds and more, this takes a few. The arithmetic is that of quota.py,
 * operation for operation: tests/test_gate_core.py plays the same rows through both and demands equal pages.
 *
 * Built by `python -m hasgpu_device.native` with any C compiler (make setup does); without it the Python core is used.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdint.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 64
#define NOBODY (-1)
#define LOCK_OFFSET (1 << 20)
#define PERMILLE 1000
#define TURN_PART 4
#define CREDIT_PART 4
#define STALE_WINDOWS 8
#define LINGER_PART 8
#define FOREVER_NS ((int64_t)1 << 62)
/* longer than any bucket is deep, short enough that times 1000 it fits into 63 bits */
#define LONG_NS ((int64_t)1 << 52)

enum { ATTACHED = 1, WAITING = 2, HOLDING = 4, BACKGROUND = 8, LINGERING = 16, GRANTED = 32 };
enum { POLL, ACQUIRE, LOOK, RENEW, RELEASE, WITHDRAW };
enum { OK = 0, NOT_HELD = 1, LOCK_FAILED = 2 };

struct slot {
    uint32_t word, flags;
    int64_t pid, stamp_ns;
    uint32_t request, limit;
    int64_t window_ns, quota, settled_ns, allowance, allowance_seen_ns, idle_since_ns, idle_lag_ns, borrow_tag_ns;
    uint8_t unused[32];
};

struct page {
    char magic[8];
    uint32_t version, slots, wanted, unused;
    int32_t holder;
    uint32_t in_use;
    int32_t borrows, turn;
    int64_t virtual_ns, seen_ns, borrow_ns, turn_left_ns;
    uint8_t unused_too[56];
    struct slot slot[SLOTS];
};

_Static_assert(sizeof(struct slot) == 128, "slot");
_Static_assert(sizeof(struct page) == 128 * (SLOTS + 1), "page");

/* What the caller wants; `request` 0: its shares have not changed. */
struct order {
    int32_t operation, slot, background, lingers;
    uint32_t request, limit;
    int64_t window_ns, now_ns, device_ns;
};

struct outcome {
    int32_t granted, borrowed;
    uint32_t expected;
    int32_t unused;
    int64_t sleep_ns, credit_ns, entitled_ns, debt_ns;
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

/* As Python divides: towards minus infinity. */
static int64_t floor_div(int64_t a, int64_t b) {
    int64_t quotient = a / b;
    return a % b < 0 ? quotient - 1 : quotient;
}

static int lives(int fd, int slot) {
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = LOCK_OFFSET + slot, .l_len = 1};
    return fcntl(fd, F_OFD_GETLK, &lock) != 0 || lock.l_type != F_UNLCK;
}

static int64_t lag_ns(const struct page *page, const struct slot *slot) {
    return floor_div(slot->quota, slot->request) + page->virtual_ns - slot->settled_ns;
}

static int64_t allowance(const struct slot *slot, int64_t now_ns) {
    int64_t elapsed_ns = max64(-LONG_NS, min64(now_ns - slot->allowance_seen_ns, LONG_NS));
    return slot->allowance + elapsed_ns * slot->limit;
}

static int within_limit(const struct slot *slot, int64_t now_ns) {
    return slot->limit >= PERMILLE || slot->limit == slot->request || allowance(slot, now_ns) > 0;
}

static int entitled(const struct page *page, const struct slot *slot, int64_t now_ns) {
    return within_limit(slot, now_ns) && lag_ns(page, slot) > 0;
}

static void settle(struct page *page, struct slot *slot, int64_t now_ns) {
    slot->quota += min64(page->virtual_ns - slot->settled_ns, LONG_NS) * slot->request;
    slot->settled_ns = page->virtual_ns;
    int64_t grown = slot->allowance + min64(max64(0, now_ns - slot->allowance_seen_ns), LONG_NS) * slot->limit;
    slot->allowance = min64(grown, slot->window_ns * slot->limit);
    slot->allowance_seen_ns = now_ns;
}

static int64_t ready_in_ns(const struct page *page, const struct slot *slot, int64_t now_ns) {
    if (slot->flags & BACKGROUND) return 0;
    if (slot->limit == slot->request) return max64(-lag_ns(page, slot) + 1, 0);
    if (within_limit(slot, now_ns)) return 0;
    return floor_div(-allowance(slot, now_ns), slot->limit) + 1;
}

static int counts(const struct page *page, uint64_t skipped, int slot, uint32_t flag) {
    return (page->slot[slot].flags & ATTACHED) && (page->slot[slot].flags & flag) && !(skipped >> slot & 1);
}

static void advance(struct page *page, uint64_t skipped, int64_t now_ns) {
    int64_t elapsed_ns = max64(0, now_ns - page->seen_ns), room_ns = FOREVER_NS;
    int busy = 0;
    page->seen_ns = now_ns;
    for (int slot = 0; slot < (int)page->in_use; slot++) {
        if (!counts(page, skipped, slot, WAITING | HOLDING)) continue;
        int64_t own_ns = page->slot[slot].window_ns - lag_ns(page, &page->slot[slot]);
        room_ns = busy ? max64(room_ns, own_ns) : own_ns;
        busy = 1;
    }
    page->virtual_ns += min64(elapsed_ns, max64(0, room_ns));
}

static void wake_up(struct page *page, struct slot *slot, int64_t now_ns) {
    int64_t cap_ns = slot->window_ns;
    settle(page, slot, now_ns);
    if (page->virtual_ns - slot->idle_since_ns < slot->window_ns) cap_ns = max64(cap_ns, slot->idle_lag_ns);
    slot->quota = min64(slot->quota, cap_ns * slot->request);
    slot->flags |= WAITING;
}

static void go_idle(struct page *page, struct slot *slot) {
    slot->flags &= ~(uint32_t)(WAITING | HOLDING);
    slot->idle_since_ns = page->virtual_ns;
    slot->idle_lag_ns = lag_ns(page, slot);
}

static void start(struct page *page, int key, int borrowed) {
    struct slot *slot = &page->slot[key];
    slot->flags = (slot->flags & ~(uint32_t)WAITING) | HOLDING;
    if (borrowed) {
        page->turn = NOBODY;
    } else if (page->turn != key || page->turn_left_ns <= 0) {
        page->turn = key;
        page->turn_left_ns = min64(slot->window_ns / TURN_PART, slot->window_ns * slot->request / PERMILLE);
    }
    page->holder = key;
    page->borrows = borrowed;
}

static void charge(struct page *page, struct slot *slot, int64_t now_ns, int64_t device_ns) {
    settle(page, slot, now_ns);
    if (!(slot->flags & BACKGROUND) || !page->borrows) slot->allowance -= device_ns * PERMILLE;
    if (page->borrows) {
        int64_t start_ns = max64(slot->borrow_tag_ns, page->borrow_ns);
        page->borrow_ns = start_ns;
        slot->borrow_tag_ns = start_ns + device_ns * PERMILLE / slot->request;
    } else {
        slot->quota -= device_ns * PERMILLE;
        page->turn_left_ns -= device_ns;
    }
}

static void reshape(struct page *page, struct slot *slot, const struct order *order) {
    settle(page, slot, order->now_ns);
    slot->request = order->request;
    slot->limit = order->limit;
    slot->window_ns = order->window_ns;
    slot->quota = min64(slot->quota, slot->window_ns * slot->request);
    slot->allowance = min64(slot->allowance, slot->window_ns * slot->limit);
    slot->idle_lag_ns = lag_ns(page, slot);
}

static int choose(const struct page *page, uint64_t skipped, int64_t now_ns, int *borrowed) {
    int best = NOBODY, turn = page->turn;
    int64_t best_ns = 0;
    *borrowed = 0;
    if (turn >= 0 && turn < (int)page->in_use && page->turn_left_ns > 0 && counts(page, skipped, turn, WAITING) &&
        entitled(page, &page->slot[turn], now_ns))
        return turn;
    for (int key = 0; key < (int)page->in_use; key++) {
        const struct slot *slot = &page->slot[key];
        if (!counts(page, skipped, key, WAITING) || !entitled(page, slot, now_ns)) continue;
        int64_t own_ns = lag_ns(page, slot);
        if (best == NOBODY || own_ns > best_ns) best = key, best_ns = own_ns;
    }
    if (best != NOBODY) return best;
    for (int key = 0; key < (int)page->in_use; key++) {
        const struct slot *slot = &page->slot[key];
        if (!counts(page, skipped, key, WAITING)) continue;
        int may_borrow = slot->limit > slot->request && within_limit(slot, now_ns);
        if (!may_borrow && !(slot->flags & BACKGROUND)) continue;
        int64_t own_ns = max64(slot->borrow_tag_ns, page->borrow_ns);
        if (best == NOBODY || own_ns < best_ns) best = key, best_ns = own_ns, *borrowed = 1;
    }
    return best;
}

static int64_t credit_ns(const struct page *page, const struct slot *slot, int64_t now_ns) {
    int64_t credit = slot->window_ns / CREDIT_PART;
    if (!page->borrows) credit = min64(credit, floor_div(lag_ns(page, slot) * slot->request, PERMILLE));
    if (slot->limit < PERMILLE && !(slot->flags & BACKGROUND))
        credit = min64(credit, floor_div(allowance(slot, now_ns), PERMILLE));
    return max64(0, credit);
}

static void clear(struct slot *slot) {
    uint32_t word = slot->word;
    memset(slot, 0, sizeof *slot);
    slot->word = word;
}

/* Lets go of what the dead and the stopped hold; returns those that do not count just now. */
static uint64_t tidy(int fd, struct page *page, const struct order *order) {
    uint64_t skipped = 0;
    for (int key = 0; key < (int)page->in_use; key++) {
        struct slot *slot = &page->slot[key];
        if (key == order->slot || !(slot->flags & ATTACHED)) continue;
        int64_t silent_ns = order->now_ns - slot->stamp_ns;
        if (page->holder == key && !lives(fd, key)) {
            clear(slot);
            page->holder = NOBODY;
        } else if (slot->flags & GRANTED) {
            if (page->holder != key) {
                slot->flags &= ~(uint32_t)GRANTED;
            } else if (silent_ns > slot->window_ns) {
                page->holder = NOBODY;
                go_idle(page, slot);
                slot->flags &= ~(uint32_t)GRANTED;
            }
        } else if (slot->flags & WAITING) {
            int64_t patience_ns = slot->window_ns * STALE_WINDOWS;
            if (slot->flags & LINGERING) patience_ns = slot->window_ns / LINGER_PART;
            if (silent_ns <= patience_ns) continue;
            if (lives(fd, key))
                skipped |= (uint64_t)1 << key;
            else
                clear(slot);
        }
    }
    return skipped;
}

/* Hands a free device on; returns the slot to wake, or NOBODY. */
static int hand_on(int fd, struct page *page, const struct order *order, uint64_t skipped) {
    int borrowed;
    if (page->holder != NOBODY) return NOBODY;
    for (;;) {
        int key = choose(page, skipped, order->now_ns, &borrowed);
        if (key == NOBODY || key == order->slot) return NOBODY;
        struct slot *slot = &page->slot[key];
        if (!lives(fd, key)) {
            clear(slot);
            continue;
        }
        if (!(slot->flags & LINGERING)) {
            start(page, key, borrowed);
            slot->flags |= GRANTED;
            slot->stamp_ns = order->now_ns;
        }
        __atomic_fetch_add(&slot->word, 1, __ATOMIC_SEQ_CST);
        return key;
    }
}

static void hold(struct page *page, uint64_t skipped, const struct order *order, struct outcome *out) {
    const struct slot *own = &page->slot[order->slot];
    int alone = 1;
    for (int key = 0; key < (int)page->in_use; key++) alone &= !counts(page, skipped, key, WAITING);
    out->granted = 1;
    out->borrowed = page->borrows;
    out->entitled_ns = max64(0, lag_ns(page, own));
    out->credit_ns = alone ? credit_ns(page, own, order->now_ns) : 0;
}

static int look(int fd, struct page *page, uint64_t skipped, const struct order *order, struct outcome *out) {
    struct slot *own = &page->slot[order->slot];
    int granted = page->holder == order->slot, borrowed, lingering = 0;
    if (!granted && page->holder == NOBODY && choose(page, skipped, order->now_ns, &borrowed) == order->slot) {
        start(page, order->slot, borrowed);
        granted = 1;
    }
    for (int key = 0; key < (int)page->in_use; key++) lingering |= key != order->slot && counts(page, 0, key, LINGERING);
    out->expected = own->word;
    out->sleep_ns = ready_in_ns(page, own, order->now_ns);
    if (!out->sleep_ns) out->sleep_ns = own->window_ns;
    out->sleep_ns = min64(out->sleep_ns, own->window_ns / (lingering ? LINGER_PART : 1));
    if (!granted) return hand_on(fd, page, order, skipped);
    hold(page, skipped, order, out);
    return NOBODY;
}

static int operate(int fd, struct page *page, uint64_t skipped, const struct order *order, struct outcome *out) {
    struct slot *own = &page->slot[order->slot];
    switch (order->operation) {
        case ACQUIRE:
            if (!(own->flags & WAITING)) wake_up(page, own, order->now_ns);
            own->flags = (own->flags & ~(uint32_t)BACKGROUND) | (order->background ? BACKGROUND : 0);
            return look(fd, page, skipped, order, out);
        case LOOK:
            if (!(own->flags & WAITING) && page->holder != order->slot) wake_up(page, own, order->now_ns);
            return look(fd, page, skipped, order, out);
        case RENEW:
            charge(page, own, order->now_ns, order->device_ns);
            page->holder = NOBODY;
            own->flags = (own->flags & ~(uint32_t)HOLDING) | WAITING;
            return look(fd, page, skipped, order, out);
        case RELEASE:
            charge(page, own, order->now_ns, order->device_ns);
            page->holder = NOBODY;
            own->flags &= ~(uint32_t)BACKGROUND;
            go_idle(page, own);
            if (order->lingers) own->flags |= WAITING;
            return hand_on(fd, page, order, skipped);
        case WITHDRAW:
            if (page->holder == order->slot) page->holder = NOBODY;
            if (own->flags & (WAITING | HOLDING)) go_idle(page, own);
            return hand_on(fd, page, order, skipped);
        default:
            return NOBODY;
    }
}

static void wake(uint32_t *word) { syscall(SYS_futex, word, FUTEX_WAKE, 1 << 30, NULL, NULL, 0); }

static int lock(int fd, int how) {
    while (flock(fd, how) != 0)
        if (errno != EINTR) return LOCK_FAILED;
    return OK;
}

/* One pass through the critical section; whoever is to run next is woken behind it. */
int hasgpu_gate_step(int fd, struct page *page, const struct order *asked, struct outcome *out) {
    struct order late = *asked;
    const struct order *order = &late;
    struct slot *own = &page->slot[order->slot];
    uint64_t skipped;
    int next = NOBODY, wanted = 0;
    memset(out, 0, sizeof *out);
    if (lock(fd, LOCK_EX) != OK) return LOCK_FAILED;
    /* Another may have looked at the clock later and been here first: going back would count that time twice. */
    late.now_ns = max64(late.now_ns, page->seen_ns);
    skipped = tidy(fd, page, order);
    advance(page, skipped, order->now_ns);
    if (order->request) reshape(page, own, order);
    if ((order->operation == RENEW || order->operation == RELEASE) && page->holder != order->slot) {
        lock(fd, LOCK_UN);
        return NOT_HELD;
    }
    next = operate(fd, page, skipped, order, out);
    own->flags &= ~(uint32_t)(LINGERING | GRANTED);
    if (order->operation == RELEASE && order->lingers) own->flags |= LINGERING;
    own->stamp_ns = order->now_ns;
    out->debt_ns = max64(0, floor_div(-lag_ns(page, own) * own->request, PERMILLE));
    for (int key = 0; key < (int)page->in_use; key++) wanted |= counts(page, skipped, key, WAITING);
    __atomic_store_n(&page->wanted, wanted, __ATOMIC_SEQ_CST);
    lock(fd, LOCK_UN);
    if (next != NOBODY) wake(&page->slot[next].word);
    return OK;
}

/* Sleeps on the slot's word while it holds `expected`; takes a grant up that was written meanwhile. */
int hasgpu_gate_sleep(int fd, struct page *page, int slot, uint32_t expected, int64_t sleep_ns, struct outcome *out) {
    struct slot *own = &page->slot[slot];
    struct timespec timeout = {.tv_sec = sleep_ns / 1000000000, .tv_nsec = sleep_ns % 1000000000};
    memset(out, 0, sizeof *out);
    if (sleep_ns > 0) syscall(SYS_futex, &own->word, FUTEX_WAIT, expected, &timeout, NULL, 0);
    if (__atomic_load_n(&page->holder, __ATOMIC_SEQ_CST) != slot) return OK;
    if (lock(fd, LOCK_EX) != OK) return LOCK_FAILED;
    if (page->holder == slot) {
        own->flags &= ~(uint32_t)GRANTED;
        out->granted = 1;
        out->borrowed = page->borrows;
        out->entitled_ns = max64(0, lag_ns(page, own));
        out->debt_ns = max64(0, floor_div(-lag_ns(page, own) * own->request, PERMILLE));
    }
    lock(fd, LOCK_UN);
    return OK;
}
