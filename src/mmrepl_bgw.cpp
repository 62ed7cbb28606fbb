/*
 * mmrepl_bgw.cpp
 *		Entry point of the library: every room's Init(), in order.
 */
#include "mmrepl/apply.hpp"
#include "mmrepl/capture.hpp"
#include "mmrepl/catalog.hpp"
#include "mmrepl/connection.hpp"
#include "mmrepl/fault.hpp"
#include "mmrepl/guc.hpp"
#include "mmrepl/registration.hpp"
#include "mmrepl/shmem.hpp"
#include "mmrepl/stats.hpp"
#include "mmrepl/transaction.hpp"
#include "mmrepl/worker.hpp"

extern "C" {
MMREPL_EXPORT const Pg_magic_struct *Pg_magic_func(void);
PG_MODULE_MAGIC;
MMREPL_EXPORT void _PG_init(void);
}

/*
 * Outside of shared_preload_libraries there is no shared memory, no hook and no
 * worker: the entry points then say that the library has to be preloaded.
 */
void
_PG_init(void)
{
	mmrepl::guc::Init();
	mmrepl::catalog::Init();
	if (!process_shared_preload_libraries_in_progress)
		return;
	mmrepl::shmem::AddRegion("mmrepl statistics", mmrepl::stats::SharedSize,
							 mmrepl::stats::InitShared);
	mmrepl::shmem::AddRegion("mmrepl connections", mmrepl::connection::SharedSize,
							 mmrepl::connection::InitShared);
	mmrepl::shmem::AddRegion("mmrepl apply", mmrepl::apply::SharedSize, mmrepl::apply::InitShared);
	MMREPL_IN_TEST_BUILD(mmrepl::shmem::AddRegion("mmrepl fault points", mmrepl::fault::SharedSize,
												  mmrepl::fault::InitShared));
	mmrepl::shmem::Init();
	mmrepl::capture::Init();
	mmrepl::registration::Init();
	mmrepl::transaction::Init();
	mmrepl::worker::Init();
}
