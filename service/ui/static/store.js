// The browser's own storage: small settings as versioned JSON, and collections of records (conversations, say).
// Nobody else sees it. Where a browser has none, or it is full, things go on in memory, and `onfull` is told.

const PREFIX = "topkapi:1:";
const DATABASE = "topkapi";
const COLLECTIONS = ["conversations", "notebooks", "comparisons"];

const memory = new Map();

/** A setting, or `otherwise`. */
export function get(name, otherwise = null) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? (memory.get(name) ?? otherwise) : JSON.parse(text);
  } catch {
    return memory.get(name) ?? otherwise;
  }
}

/** Keep a setting; whether it will outlive the page. */
export function set(name, value) {
  memory.set(name, value);
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

export function remove(name) {
  memory.delete(name);
  try {
    localStorage.removeItem(PREFIX + name);
  } catch {
    // Then it was never kept.
  }
}

let opened = null;

function database() {
  opened ??= new Promise((settle, fail) => {
    const asked = indexedDB.open(DATABASE, 1);
    asked.onupgradeneeded = () => {
      for (const name of COLLECTIONS) {
        if (!asked.result.objectStoreNames.contains(name)) asked.result.createObjectStore(name, { keyPath: "id" });
      }
    };
    asked.onsuccess = () => settle(asked.result);
    asked.onerror = () => fail(asked.error);
    asked.onblocked = () => fail(new Error("another page holds the storage"));
  });
  return opened;
}

/**
 * Records with an `id` each: `all()`, `put(record)`, `remove(id)`. `onfull(error)` is told when one can't be kept, and
 * `onchange(id, record)` what another tab of this browser has kept (null: removed).
 */
export function collection(name, { onfull = () => {}, onchange = () => {} } = {}) {
  const records = new Map();
  const others = new BroadcastChannel(PREFIX + name);
  others.addEventListener("message", ({ data }) => {
    if (data.record) records.set(data.id, data.record);
    else records.delete(data.id);
    onchange(data.id, data.record);
  });

  async function run(mode, work) {
    const store = (await database()).transaction(name, mode).objectStore(name);
    return new Promise((settle, fail) => {
      const asked = work(store);
      // A page that goes away takes with it what it has not been told to have done.
      store.transaction.commit?.();
      store.transaction.oncomplete = () => settle(asked.result);
      store.transaction.onabort = () => fail(store.transaction.error ?? asked.error);
      store.transaction.onerror = () => fail(asked.error);
    });
  }

  return {
    async all() {
      try {
        for (const record of await run("readonly", (store) => store.getAll())) records.set(record.id, record);
      } catch {
        // What is in memory is all there is.
      }
      return [...records.values()];
    },
    async put(record) {
      records.set(record.id, record);
      try {
        await run("readwrite", (store) => store.put(record));
        others.postMessage({ id: record.id, record });
        return true;
      } catch (error) {
        onfull(error);
        return false;
      }
    },
    async remove(id) {
      records.delete(id);
      try {
        await run("readwrite", (store) => store.delete(id));
        others.postMessage({ id, record: null });
      } catch {
        // It is gone from memory at least.
      }
    },
  };
}
